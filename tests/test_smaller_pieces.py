"""What does not fit into memory is done in smaller pieces, or elsewhere; other failures stay what they are."""

import gc
import weakref

import pytest
import torch
from torch import Tensor

from hcsmoe_hub.machine.smaller_pieces import and_host, first_that_fits, halves

HOST = torch.device("cpu")


def out_of_memory() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_ways_are_tried_until_one_fits() -> None:
    tried: list[int] = []

    def attempt(size: int) -> int:
        tried.append(size)
        if size > 4:
            raise out_of_memory()
        return size

    assert first_that_fits(attempt, list(halves(16, 1)), HOST) == 4
    assert tried == [16, 8, 4]


def test_what_the_last_way_raises_is_not_hidden() -> None:
    def attempt(_size: int) -> None:
        raise out_of_memory()

    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        first_that_fits(attempt, [2, 1], HOST)


def test_other_failures_end_the_attempts() -> None:
    tried: list[int] = []

    def attempt(size: int) -> None:
        tried.append(size)
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        first_that_fits(attempt, [2, 1], HOST)
    assert tried == [2]


def test_what_an_attempt_has_allocated_is_gone_before_the_next_one() -> None:
    seen: list[weakref.ref[Tensor]] = []

    def attempt(size: int) -> bool:
        large = torch.zeros(size)
        if not seen:
            seen.append(weakref.ref(large))
            raise out_of_memory()
        gc.collect()
        return seen[0]() is None

    assert first_that_fits(attempt, [2, 1], HOST)


@pytest.mark.parametrize(("size", "least", "expected"), [(16, 4, [16, 8, 4]), (7, 2, [7, 3]), (1, 32, [1])])
def test_a_size_is_halved_until_it_is_small(size: int, least: int, expected: list[int]) -> None:
    assert list(halves(size, least)) == expected


def test_the_host_stands_in_for_another_device_only() -> None:
    assert and_host(HOST) == [HOST]
    assert and_host(torch.device("meta")) == [torch.device("meta"), HOST]
