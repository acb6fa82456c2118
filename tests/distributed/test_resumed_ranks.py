"""A conversion on two ranks of which one is killed: the same launch goes on, and ends in the same bytes."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
from launched_ranks import PATIENCE_SECONDS, launched, outcome
from tiny_models import build, token_ids

LAYERS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of several layers, and text that takes a moment in each of them."""
    found = tmp_path_factory.mktemp("ranks")
    build(found / "model", num_hidden_layers=LAYERS)
    np.save(found / "ids.npy", token_ids(64, 64).numpy())
    return found


def words(folder: Path, output: Path) -> list[object]:
    asked = ["convert", folder / "model", "--experts", 4, "--device", "cpu", "--calibration", folder / "ids.npy"]
    return [*asked, "--max-shard-size", "100KB", "--output", output]


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Path:
    output = folder / "undisturbed"
    with launched(*words(folder, output)) as ranks:
        found = [outcome(rank) for rank in ranks]
    assert [code for code, _, _ in found] == [0, 0], found
    return output


def layers_done(output: Path) -> int:
    """Decoder layers that are converted for good."""
    path = output / "hcsmoe.incomplete" / "progress" / "journal.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return sum(json.loads(line)["step"] == "convert" for line in lines if line.endswith("\n"))


@pytest.mark.parametrize("killed", [0, 1])
def test_the_same_launch_goes_on_where_a_rank_was_killed(folder: Path, undisturbed: Path, killed: int) -> None:
    output = folder / f"resumed-{killed}"
    with launched(*words(folder, output)) as ranks:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while layers_done(output) < 2:
            assert time.monotonic() < deadline
            assert all(rank.poll() is None for rank in ranks)
            time.sleep(0.005)
        ranks[killed].kill()
        code, _, errors = outcome(ranks[1 - killed])
    assert code == 1
    assert errors.count("Error:") == 1
    done = layers_done(output)
    assert 2 <= done < LAYERS
    assert [path.name for path in output.iterdir()] == ["hcsmoe.incomplete"]
    with launched(*words(folder, output)) as ranks:
        found = [outcome(rank) for rank in ranks]
    assert [code for code, _, _ in found] == [0, 0], found
    shards = sorted(path.name for path in undisturbed.glob("*.safetensors"))
    assert len(shards) > 2
    assert sorted(path.name for path in output.glob("*.safetensors")) == shards
    assert all((output / name).read_bytes() == (undisturbed / name).read_bytes() for name in shards)
    assert not (output / "hcsmoe.incomplete").exists()
