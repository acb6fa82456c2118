"""Plans of the calibration set: its length, what is refused before anything is loaded, without network access."""

from importlib.resources import files as package_files
from pathlib import Path

import numpy as np
import pytest
from calibration_text import plan, refusal, save
from places import EXAMPLE

from hcsmoe_hub import ConvertOptions
from hcsmoe_hub import plan as plan_conversion
from hcsmoe_hub.calibration.plan import plan_calibration
from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.events import Event
from hcsmoe_hub.options import DEFAULT_TOKENS, FITTED_TOKENS, CalibrationOptions
from hcsmoe_hub.pipeline.run import load_tokens

pytestmark = pytest.mark.usefixtures("no_network", "short_wait")


@pytest.mark.parametrize(("max_positions", "length"), [(64, 64), (2048, 2048), (131072, 2048), (None, 2048)])
def test_the_default_length_is_2048_or_the_limit_of_the_model(max_positions: int | None, length: int) -> None:
    assert plan("bundled", sequence_length=None, max_positions=max_positions).sequence_length == length


def test_a_length_of_all_positions_is_accepted_and_one_more_is_refused() -> None:
    assert plan("bundled", sequence_length=64).tokens == 128
    error = refusal(lambda: plan("bundled", sequence_length=65), PlanError)
    assert "65 tokens" in error.message
    assert "64 positions of org/model" in error.message
    assert "`sequence_length=64`" in error.hint


def test_any_length_is_accepted_when_the_model_has_no_limit() -> None:
    assert plan("bundled", sequence_length=100_000, max_positions=None).sequence_length == 100_000


def test_token_ids_longer_than_the_positions_are_refused(tmp_path: Path) -> None:
    file = save(tmp_path / "ids.npy", np.zeros((1, 65), dtype=np.int64))
    assert "65 tokens are longer than the 64 positions" in refusal(lambda: plan(file), PlanError).message


def test_token_ids_that_are_too_long_are_not_blamed_on_an_option(tmp_path: Path) -> None:
    file = save(tmp_path / "ids.npy", np.zeros((1, 65), dtype=np.int64))
    assert "sequence_length" not in refusal(lambda: plan(file), PlanError).hint


@pytest.mark.parametrize("dataset", ["bundled", "c4", "org/name"])
def test_text_without_a_tokenizer_is_refused_with_a_hint(dataset: str) -> None:
    options = CalibrationOptions(dataset=dataset)
    error = refusal(
        lambda: plan_calibration(options, max_positions=64, has_tokenizer=False, label="org/model", fits=False),
        PlanError,
    )
    assert "org/model has no tokenizer" in error.message
    assert ".npy" in error.hint


@pytest.mark.parametrize("dataset", ["bundled", "c4", "org/name"])
def test_a_plan_looks_nothing_up(dataset: str) -> None:
    found = plan(dataset, seed=3, text_column="body")
    assert (found.dataset, found.seed, found.text_column, found.is_token_ids) == (dataset, 3, "body", False)


@pytest.mark.parametrize(
    "dataset",
    [
        "missing.jsonl",
        "folder/missing.txt",
        "missing",
        "./folder/missing",
        "~/missing",
        "/a/b/c",
        "a/b/c",
        "/missing",
    ],
)
def test_a_missing_file_is_refused_and_not_mistaken_for_a_repository(dataset: str) -> None:
    assert f"there is no calibration file {dataset}" in refusal(lambda: plan(dataset)).message


@pytest.mark.parametrize("name", ["a.docx", "a.npz", "a.tar.gz", "a.docx.zst", "a"])
def test_a_file_of_an_unknown_type_is_refused_with_the_known_types(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("w1 w2 w3 w4")
    error = refusal(lambda: plan(tmp_path / name))
    assert f"{tmp_path / name} has an unknown file type" in error.message
    assert all(ending in error.hint for ending in (".jsonl", ".json", ".txt", ".parquet", ".csv", ".npy"))


@pytest.mark.parametrize(("samples", "warnings"), [(None, 0), (256, 1)], ids=["wanted by default", "asked for"])
def test_a_text_that_is_longer_than_usual_is_enough_for_a_fit_unless_more_was_requested(
    samples: int | None, warnings: int, tmp_path: Path
) -> None:
    bundled = (package_files("hcsmoe_hub.calibration") / "data" / "bundled.jsonl").read_bytes()
    (tmp_path / "part.jsonl").write_bytes(b"\n".join(bundled.splitlines()[:40]))
    calibration = CalibrationOptions(dataset=str(tmp_path / "part.jsonl"), samples=samples)
    planned = plan_conversion(EXAMPLE, ConvertOptions(experts=4, calibration=calibration, output=tmp_path / "result"))
    events: list[Event] = []
    found = load_tokens(planned, events.append).token_ids
    assert DEFAULT_TOKENS < found.numel() < FITTED_TOKENS
    assert len(events) == warnings
