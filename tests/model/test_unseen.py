"""Hidden states that the model only passes on stay in parts; those that it computes with are put together first."""

import torch

from hcsmoe_hub.model.unseen import Unseen

ONE, OTHER = torch.arange(6.0).view(3, 2), 10 + torch.arange(4.0).view(2, 2)


def unseen() -> Unseen:
    """Three rows of one set, two of another, none of a third that has one, and two more."""
    return Unseen({"one": ONE, "other": OTHER}, {"one": 3, "none": 1, "other": 2}, 8)


def test_a_part_comes_back_as_it_is() -> None:
    assert unseen().part("one") is ONE
    assert unseen().part("none") is None


def test_shape_and_dtype_are_those_of_the_whole() -> None:
    found = unseen()
    assert (found.shape, found.dtype, found.device.type) == ((8, 2), torch.float32, "cpu")
    assert found.part("one") is ONE


def test_a_computation_sees_all_rows_and_copies_of_the_first_for_those_that_are_missing() -> None:
    row = ONE[:1]
    assert torch.equal(unseen() + 0, torch.cat([ONE, row, OTHER, row, row]))
    assert torch.equal(torch.nn.functional.linear(unseen(), torch.eye(2))[:3], ONE)


def test_the_parts_do_not_count_any_more_once_the_whole_has_been_looked_at() -> None:
    found = unseen()
    found.add_(1)
    assert found.part("one") is None
    assert torch.equal(found[:3].clone(), ONE + 1)
    assert ONE[0, 0] == 0


def test_a_single_part_is_not_copied() -> None:
    found = Unseen({"one": ONE}, {"one": 3}, 3)
    assert found.whole() is ONE
