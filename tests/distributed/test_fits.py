"""Two processes with half of the tokens each fit a layer as one process does."""

from pathlib import Path
from typing import Any

import pytest
from fitting_pair import fit_twice
from rank_pair import RankPair
from tiny_models import build, options, token_ids

from hcsmoe_hub.options import MethodOptions, Preset, Refit, RouterPolicy

# Several sequences per micro-batch, and several micro-batches for each rank.
SEQUENCES, LENGTH = 64, 32
WANTED: dict[str, dict[str, Any]] = {
    "down": {"refit": Refit.DOWN},
    "block": {"refit": Refit.BLOCK},
    "router": {"router": RouterPolicy.FIT},
}


@pytest.mark.parametrize("what", WANTED)
def test_two_ranks_fit_a_layer_as_one_process_does(pair: RankPair, tmp_path: Path, what: str) -> None:
    source, ids = build(tmp_path / "model"), token_ids(SEQUENCES, LENGTH)
    method = MethodOptions(preset=Preset.HC_SMOE, **WANTED[what])
    # The fits of routers of more experts are dropped here.
    experts = 2 if what == "router" else 4
    wanted = options(source, experts, ids=ids, method=method, batch_tokens=SEQUENCES * LENGTH // 4, device="cpu")
    for answer in pair.convert((str(source), wanted), by=fit_twice):
        found = answer.report
        assert found.alone.is_kept
        if what == "router":
            assert found.shared == found.alone
        else:
            assert found.shared.is_kept
            assert found.shared.fitted_tokens == found.alone.fitted_tokens
            assert found.shared.held_out_tokens == found.alone.held_out_tokens
            assert found.shared.error_after == pytest.approx(found.alone.error_after, rel=1e-3)
        assert any(found.moved.values())
        assert all(found.apart[name] <= 1e-2 * moved for name, moved in found.moved.items())
