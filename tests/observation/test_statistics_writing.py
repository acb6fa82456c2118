"""A statistics file by itself: what is written comes back, and what was not finished is not left behind."""

import errno
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import contents, same_bits

from hcsmoe_hub.errors import OutputError
from hcsmoe_hub.observation.statistics import Call, LayerStatistics
from hcsmoe_hub.observation.statistics_file import StatisticsFile
from hcsmoe_hub.observation.statistics_writer import open_statistics


def layer_statistics(seed: int) -> LayerStatistics:
    """Random statistics of six experts."""
    numbers = torch.Generator().manual_seed(seed)
    return LayerStatistics(
        tokens=30,
        usage_E=torch.randint(0, 9, (6,), generator=numbers),
        routing_score_E=torch.rand(6, generator=numbers, dtype=torch.float64),
        saliency_E=torch.rand(6, generator=numbers, dtype=torch.float64),
        outputs_EH=torch.randn(6, 8, generator=numbers),
        logits_gram_EE=torch.randn(6, 6, generator=numbers, dtype=torch.float64),
        sample=Call(
            (torch.randn(1, 5, 8, generator=numbers).bfloat16(), torch.arange(5)[None]),
            # A view, as blocks are often given: what is stored must not depend on it.
            {"residual": torch.randn(1, 8, 5, generator=numbers).transpose(1, 2)},
        ),
        mass_E=torch.rand(6, generator=numbers, dtype=torch.float64),
        norm_E=torch.rand(6, generator=numbers, dtype=torch.float64),
        gram_EE=torch.randn(6, 6, generator=numbers, dtype=torch.float64),
    )


TEXT = {"dataset": "bundled", "text_column": None}


def write(path: Path, *layers: LayerStatistics) -> None:
    with open_statistics(path) as writer:
        for number, statistics in enumerate(layers):
            writer.add(number, statistics)
        writer.describe(
            {
                "fingerprint": "",
                "source": "a model",
                "options": TEXT | {"samples": 6, "sequence_length": 5, "feature_tokens": 8},
                "plan": TEXT | {"sequences": 6, "sequence_length": 5, "seed": 0, "is_token_ids": False},
                "calibration": TEXT
                | {"sequences": 6, "sequence_length": 5, "tokens": 30, "seed": 0, "feature_tokens": 8}
                | {"sha256": "0" * 64, "dataset_sha256": None},
                "layers": list(range(len(layers))),
            }
        )


def tensors_of(statistics: LayerStatistics) -> list[torch.Tensor]:
    """Every tensor of one layer."""
    sample = statistics.sample
    assert sample is not None
    own = [statistics.usage_E, statistics.routing_score_E, statistics.saliency_E]
    own += [value for value in (statistics.mass_E, statistics.norm_E, statistics.gram_EE) if value is not None]
    return [*own, statistics.outputs_EH, statistics.logits_gram_EE, *sample.args, *sample.kwargs.values()]


def test_every_tensor_comes_back_bit_for_bit(tmp_path: Path) -> None:
    layers = [layer_statistics(0), layer_statistics(1)]
    write(tmp_path / "statistics", *layers)
    file = StatisticsFile(tmp_path / "statistics")
    for number, expected in enumerate(layers):
        found = file.layer(number)
        assert found.tokens == 30
        assert found.sample is not None
        assert found.sample.kwargs.keys() == {"residual"}
        pairs = list(zip(tensors_of(found), tensors_of(expected), strict=True))
        assert len(pairs) == 11
        assert all(same_bits(one, other.contiguous()) for one, other in pairs)
    assert [usage.tolist() for usage in file.usage().values()] == [layer.usage_E.tolist() for layer in layers]


def test_inputs_that_are_none_stay_where_they_were(tmp_path: Path) -> None:
    tokens = torch.randn(1, 5, 8)
    write(tmp_path / "statistics", replace(layer_statistics(0), sample=Call((tokens, None, tokens[..., 0]))))
    sample = StatisticsFile(tmp_path / "statistics").layer(0).sample
    assert sample is not None
    assert [None if value is None else value.shape for value in sample.args] == [(1, 5, 8), None, (1, 5)]


def test_the_same_statistics_are_the_same_bytes(tmp_path: Path) -> None:
    for name in ("first", "second"):
        write(tmp_path / name, layer_statistics(0))
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


# Failures

FAILURES = [RuntimeError("broken"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")]


def interrupt(path: Path, failure: BaseException) -> None:
    """Writes a part of a file until something fails."""
    with open_statistics(path) as writer:
        writer.add(0, layer_statistics(1))
        raise failure


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
def test_nothing_is_left_of_a_file_that_was_not_finished(tmp_path: Path, failure: BaseException) -> None:
    with pytest.raises(type(failure)) as caught:
        interrupt(tmp_path / "deep" / "statistics", failure)
    assert caught.value is failure
    assert list((tmp_path / "deep").iterdir()) == []


def test_an_unfinished_file_does_not_take_the_place_of_a_finished_one(tmp_path: Path) -> None:
    write(tmp_path / "statistics", layer_statistics(0))
    before = contents(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        interrupt(tmp_path / "statistics", KeyboardInterrupt())
    assert contents(tmp_path) == before


@pytest.mark.parametrize("place", ["file/statistics", "file/deep/statistics", "folder"])
def test_a_place_that_cannot_be_written_is_an_error_with_a_hint(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    with pytest.raises(OutputError, match=f"{place} cannot be written") as caught:
        write(tmp_path / place, layer_statistics(0))
    assert "`statistics`" in caught.value.hint
    assert contents(tmp_path) == {"file": b"mine"}


def test_a_disk_that_fills_up_is_an_error_with_a_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "writestr", fail)
    with pytest.raises(OutputError, match="No space left on device"):
        write(tmp_path / "statistics", layer_statistics(0))
    assert contents(tmp_path) == {}
