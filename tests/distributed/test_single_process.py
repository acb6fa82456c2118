"""Without a process group, what ranks would bring together is what there is."""

import pytest
import torch

from hcsmoe_hub.errors import HcsmoeError, PlanError
from hcsmoe_hub.machine import ranks


def test_a_single_process_is_the_first_of_one() -> None:
    assert (ranks.size(), ranks.number(), ranks.is_first(), ranks.is_shared()) == (1, 0, True, False)
    assert (ranks.local_number(), ranks.local_size()) == (0, 1)
    assert ranks.block(7) == slice(0, 7)


def test_it_brings_together_what_it_has() -> None:
    values = torch.arange(6.0).view(3, 2)
    assert ranks.add_up(values) is values
    assert ranks.joined(values) is values
    assert ranks.place(3, values.device) == (0, 3)
    assert ranks.every("own") == ["own"]
    assert ranks.from_first("own") == "own"
    assert ranks.first(lambda: 1) == ranks.on_first(lambda: 1) == ranks.alike(lambda: 1) == 1


def test_its_refusals_are_its_own() -> None:
    def refuse() -> None:
        raise PlanError("no.", hint="do")

    for function in (ranks.alike, ranks.first, ranks.on_first):
        with pytest.raises(PlanError) as caught:
            function(refuse)
        assert isinstance(caught.value, HcsmoeError)


def test_the_first_rank_that_differs_is_named_with_what_differs() -> None:
    same = {"experts": "4", "seed": "0"}
    assert ranks.differing([same, same]) is None
    assert ranks.differing([same, same, same | {"seed": "1"}]) == (2, "seed")
