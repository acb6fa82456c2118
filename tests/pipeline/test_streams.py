"""How several sets of hidden states share the batch of one forward."""

from collections import UserDict
from typing import Any

import pytest
import torch
from torch import Tensor

from hcsmoe_hub.observation.statistics import Call
from hcsmoe_hub.pipeline.streams import Part, Streams

LENGTH = 6


def ids(sequences: int, start: int = 0) -> Tensor:
    """Sequences that differ from each other."""
    return (start + torch.arange(sequences))[:, None].expand(-1, LENGTH)


def streams(calibration: int, measured: int, *, doubles: bool = False) -> Streams:
    return Streams(ids(calibration), ids(measured, 100), doubles=doubles, lengths={LENGTH, LENGTH - 1})


@pytest.mark.parametrize("doubles", [False, True])
@pytest.mark.parametrize(("calibration", "measured"), [(4, 2), (1, 1), (2, 1), (6, 6), (0, 3), (4, 0)])
def test_every_set_gets_its_own_rows_back(calibration: int, measured: int, doubles: bool) -> None:
    sets = streams(calibration, measured, doubles=doubles)
    assert len(sets.batch) not in {LENGTH, LENGTH - 1} or (measured == 0 and not doubles)
    found = sets.split(Call((sets.batch,), {"position_ids": torch.arange(LENGTH)[None]}))
    expected = {Part.SOURCE: ids(calibration), Part.MEASURED: ids(measured, 100)}
    expected |= {Part.REDUCED: ids(calibration if doubles else 0), Part.MEASURED_REDUCED: ids(measured, 100)}
    assert found.keys() == {part for part, rows in expected.items() if len(rows)}
    for part, call in found.items():
        assert torch.equal(call.args[0], expected[part])
        assert call.kwargs["position_ids"].shape == (1, LENGTH)
    joined = sets.join({part: (call.args[0], None) for part, call in found.items()})
    assert torch.equal(joined[0], sets.batch)


def test_the_states_of_held_out_sequences_are_found_in_the_batch() -> None:
    sets = streams(3, 2, doubles=True)
    found = sets.measured(torch.arange(len(sets.batch))[:, None, None].expand(-1, LENGTH, 4))
    rows = {part: states[:, 0, 0].tolist() for part, states in found.items()}
    assert rows == {Part.MEASURED: [3, 4], Part.MEASURED_REDUCED: [8, 9]}


def test_sets_that_are_recalled_have_no_rows() -> None:
    sets = Streams(ids(3), ids(2, 100), doubles=True, lengths={LENGTH}, recalled={Part.SOURCE, Part.MEASURED})
    found = sets.split(Call((sets.batch,)))
    assert {part: call.args[0][:, 0].tolist() for part, call in found.items()} == {
        Part.REDUCED: [0, 1, 2],
        Part.MEASURED_REDUCED: [100, 101],
    }
    assert sets.measured(sets.batch[..., None]).keys() == {Part.MEASURED_REDUCED}


def test_a_set_that_a_layer_leaves_out_keeps_its_place() -> None:
    sets = streams(3, 2)
    joined = sets.join({Part.SOURCE: ids(3)})
    assert joined.shape == sets.batch.shape
    assert torch.equal(joined[:3], ids(3))


def test_what_layers_share_is_kept_apart_by_set() -> None:
    sets, shared = streams(3, 2), UserDict[str, Any]()
    for layer in range(2):
        for part, call in sets.split(Call((sets.batch,), {"shared": shared})).items():
            if layer == 0:
                call.kwargs["shared"]["keys"] = part
            assert call.kwargs["shared"]["keys"] is part
    assert not shared
