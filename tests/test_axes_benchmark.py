"""The benchmark of both axes compares shapes of equal parameters, marks the best, and resumes."""

import importlib
from pathlib import Path
from typing import Any

import pytest
from calibration_text import VOCABULARY, write_rows, write_tokenizer
from places import ROOT
from tiny_models import build

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(ROOT / "benchmarks"))
    kept, axes = map(importlib.import_module, ("axes_rows", "axes"))

Shape = kept.Shape
SOURCE = Shape(8, 192)


def row(experts: int, width: int, ratio: float, **others: Any) -> Any:
    """A row of a model with half of its parameters."""
    figures = {"model": "tiny", "share": 0.5, "fit": "none", "absent": "", "output_error": 0.5}
    figures |= {"cpu_seconds": 1.0, "tokens": 64, "ratio": (ratio, ratio - 0.1, ratio + 0.1)}
    return kept.Row(experts=experts, width=width, **figures | others)


# Tables


def test_the_best_shape_of_a_column_is_bold_and_the_choice_of_the_planner_is_marked() -> None:
    rows = [row(8, 96, 2.0), row(6, 128, 1.5), row(4, 192, 1.9), row(4, 192, 1.4, fit="down")]
    lines = kept.shape_table(rows, SOURCE, {rows[0].case: Shape(4, 192)}).splitlines()
    assert [line.count("**") for line in lines] == [0, 0, 0, 2, 2]
    assert "**1.500**" in lines[3]
    assert "1.900 (1.800 to 2.000) †" in lines[4]
    assert "**1.400** (1.300 to 1.500) †" in lines[4]


def test_a_choice_is_too_far_from_the_best_from_five_percent_of_its_excess_on() -> None:
    rows = [row(6, 128, 1.50), row(5, 144, 1.53), row(4, 192, 1.52)]
    near, far = (kept.planner_table(rows, {rows[0].case: shape}) for shape in (Shape(4, 192), Shape(5, 144)))
    assert "| 3 | +4.0 % |" in near
    assert "| 3 | +6.0 %, too much |" in far


def test_the_planner_chooses_the_shape_of_least_predicted_error() -> None:
    found = kept.Prediction(
        model="tiny", share=0.5, absent="", candidates=((8, 96, 0.3), (6, 128, 0.2), (4, 192, 0.4)), cpu_seconds=1.0
    )
    assert found.chosen == Shape(6, 128)


# Rows


def test_rows_of_both_axes_are_found_again(tmp_path: Path) -> None:
    written = kept.Rows(tmp_path / "rows.json", {"records": 80})
    written.sources["tiny"] = SOURCE
    written.add(row(6, 128, 1.5))
    written.predict(kept.Prediction(model="tiny", share=0.5, absent="", candidates=((6, 128, 0.2),), cpu_seconds=1.0))
    read = kept.Rows(tmp_path / "rows.json")
    assert (read.rows, read.predictions) == (written.rows, written.predictions)
    assert (read.sources, read.settings) == ({"tiny": SOURCE}, {"records": 80})
    with pytest.raises(SystemExit, match="choose another"):
        kept.Rows(tmp_path / "rows.json", {"records": 40})


def test_a_model_is_measured_on_both_axes_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    build(
        folder,
        intermediate_size=96,
        vocab_size=VOCABULARY,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=0,
    )
    write_tokenizer(folder, eos_token="</s>")
    words = [" ".join(f"w{(7 * record + 3 * word) % 400}" for word in range(80)) for record in range(8)]
    text = [{"text": one, "domain": "prose" if number % 2 else "french"} for number, one in enumerate(words)]
    file, rows = write_rows(tmp_path / "text.jsonl", text), tmp_path / "rows.json"
    command = ["axes.py", "--model", str(folder), "--calibration", str(file), "--text", str(file), "--keep", "0.5"]
    command += ["--fits", "none", "--absent", "french", "--samples", "2", "--sequence-length", "32"]
    monkeypatch.setattr("sys.argv", [*command, "--json", str(rows)])
    axes.main()
    found = kept.Rows(rows).rows
    shapes = axes.candidates(axes.opened(str(folder)), 0.5)
    assert [row.shape for row in found.values() if not row.absent] == shapes
    assert [row.shape for row in found.values() if row.absent == "french"] == shapes
    monkeypatch.setattr(axes, "convert", lambda *args: pytest.fail("was converted"))
    axes.main()
    monkeypatch.setattr("sys.argv", [*command, "--planner", "--json", str(rows)])
    axes.main()
    predicted = kept.Rows(rows).predictions
    assert {absent for _, _, absent in predicted} == {"", "french"}
    assert all(one.chosen in shapes for one in predicted.values())
