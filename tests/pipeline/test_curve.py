"""Size against quality: what a curve says of a point is what a conversion to it says."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from architectures import save_tiny
from held_out_text import DOMAINS, held_out_ids, hold_out
from quantized_models import BUILDERS
from tiny_models import build, contents, token_ids

from hcsmoe_hub import convert
from hcsmoe_hub.curve import curve
from hcsmoe_hub.errors import CalibrationError, HcsmoeError, PlanError
from hcsmoe_hub.methods.quality.prediction import RatioLaw, excess_error, leave_one_out
from hcsmoe_hub.options import CalibrationOptions, ConvertOptions, CurveOptions, MethodOptions, Propagate, Refit
from hcsmoe_hub.report import ConversionReport
from hcsmoe_hub.report.curve import CurvePoint, CurveReport

UNFITTED = MethodOptions(refit=Refit.NONE, propagate=Propagate.ORIGINAL)
# Router weights on the inputs, an MoE block that is the decoder layer itself, layers that share keys and values, and
# several copies of the hidden states.
EVERYWHERE = ["mixtral", "llama4_text", "gemma4_text", "deepseek_v4"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model of 8 experts of 48 neurons, 2 active."""
    return build(tmp_path / "source", as_published=False)


@pytest.fixture
def ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Token ids to calibrate on, with held-out sequences of two domains."""
    hold_out(monkeypatch, held_out_ids())
    path = tmp_path / "ids.npy"
    np.save(path, token_ids().numpy())
    return path


def draw(source: Path, ids: Path, experts: tuple[int, ...], *widths: int | str, **others: Any) -> CurveReport:
    """A curve of all combinations."""
    wanted = CurveOptions(
        experts=experts, expert_width=widths, calibration=CalibrationOptions(dataset=str(ids)), **others
    )
    return curve(source, wanted)


def converted(source: Path, ids: Path, output: Path, **others: Any) -> ConversionReport:
    """A conversion without a refit on the same text."""
    text = CalibrationOptions(dataset=str(ids))
    return convert(source, ConvertOptions(output=output, calibration=text, method=UNFITTED, **others))


def refused(kind: type[HcsmoeError], *arguments: Any, **others: Any) -> HcsmoeError:
    """The refusal of a curve."""
    with pytest.raises(kind) as caught:
        draw(*arguments, **others)
    assert caught.value.hint
    return caught.value


def same_figures(point: CurvePoint, report: ConversionReport) -> None:
    """Checks a point against a conversion to its size."""
    assert point.measured is not None
    assert report.measured is not None
    assert point.parameters == report.parameters["after"]
    assert point.active_parameters == report.active_parameters["after"]
    assert point.weights_bytes == report.weights_bytes["after"]
    assert point.measured["domains"].keys() == report.measured["domains"].keys() == set(DOMAINS)
    for found, expected in [
        (point.measured["overall"], report.measured["overall"]),
        *((row, report.measured["domains"][domain]) for domain, row in point.measured["domains"].items()),
    ]:
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_the_point_that_keeps_everything_is_the_source(source, ids):
    report = draw(source, ids, (8, 6), "100%")
    whole, less = report.points
    assert whole.measured["overall"]["ratio"] == 1
    assert whole.measured["overall"]["kl"] == 0
    assert whole.predicted_ratio == 1
    assert (whole.parameters, whole.weights_bytes) == (report.parameters, report.weights_bytes)
    assert [layer.output_error for layer in whole.layers] == [0, 0]
    assert less.weights_bytes < report.weights_bytes


def test_points_have_the_figures_of_conversions(source, ids, tmp_path):
    report = draw(source, ids, (8, 5), "100%", 24)
    assert [(point.experts, point.expert_width) for point in report.points] == [(8, 48), (8, 24), (5, 48), (5, 24)]
    for point in report.points[1:]:
        size = {"experts": point.experts, "expert_width": point.expert_width}
        out = tmp_path / f"{point.experts}-{point.expert_width}"
        same_figures(point, converted(source, ids, out, **size))


@pytest.mark.parametrize("model_type", EVERYWHERE)
def test_points_have_the_figures_of_conversions_everywhere(model_type, ids, tmp_path):
    source = tmp_path / "source"
    save_tiny(model_type, source)
    (point,) = draw(source, ids, (4,)).points
    same_figures(point, converted(source, ids, tmp_path / "out", experts=4))


def test_points_of_a_quantised_source_are_rounded_like_conversions(ids, tmp_path):
    source = BUILDERS["qwen3-fp8"](tmp_path / "source")
    (point,) = draw(source, ids, (4,)).points
    same_figures(point, converted(source, ids, tmp_path / "out", experts=4))


def test_nothing_is_written_but_what_was_asked_for(source, ids, tmp_path, monkeypatch):
    before = contents(source)
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    draw(source, ids, (6,))
    assert list(folder.iterdir()) == []
    pytest.importorskip("matplotlib")
    draw(source, ids, (6, 4), "100%", "50%", statistics=folder / "stats", figure=folder / "curve.png")
    assert sorted(path.name for path in folder.iterdir()) == ["curve.png", "stats"]
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert contents(source) == before


def test_its_statistics_convert_to_any_point(source, ids, tmp_path):
    draw(source, ids, (6,), statistics=tmp_path / "stats")
    converted(source, ids, tmp_path / "direct", experts=5)
    converted(source, ids, tmp_path / "later", experts=5, statistics=tmp_path / "stats")
    direct, later = (
        {name: data for name, data in contents(tmp_path / folder).items() if name.endswith(".safetensors")}
        for folder in ("direct", "later")
    )
    assert direct
    assert direct == later


def test_other_points_are_predicted_from_those_that_are_measured(source, ids):
    whole = draw(source, ids, (7, 6, 5, 4, 3))
    some = draw(source, ids, (7, 6, 5, 4, 3), measure_points=3)
    assert [point.measured is None for point in some.points] == [False, True, False, True, False]
    for number in (0, 2, 4):
        assert some.points[number].measured == whole.points[number].measured
    for one, other in zip(some.points, whole.points, strict=True):
        assert one.layers == other.layers


def test_predicted_losses_grow_as_experts_and_neurons_go(source, ids):
    report = draw(source, ids, (8, 4), "100%", "50%")
    whole, narrow, few, both = (point.layers[0].predicted_loss for point in report.points)
    assert whole == 0
    assert whole < min(narrow, few) <= max(narrow, few) < both <= 1


def test_numbers_of_experts_that_the_model_does_not_have_are_refused(source, ids):
    assert "9 experts" in refused(PlanError, source, ids, (6, 9)).message
    assert "2" in refused(PlanError, source, ids, (1,)).message


def test_widths_that_the_model_cannot_have_are_refused(source, ids, tmp_path):
    assert "49 neurons" in refused(PlanError, source, ids, (), 49).message
    with pytest.raises(PlanError, match="width"):
        CurveOptions(expert_width=("120%",))
    with pytest.raises(PlanError, match="measure_points"):
        CurveOptions(measure_points=2)


def test_a_curve_needs_text_to_measure_on(source, tmp_path, monkeypatch):
    np.save(tmp_path / "ids.npy", token_ids().numpy())
    assert "held-out" in refused(CalibrationError, source, tmp_path / "ids.npy", (6,)).message


def test_statistics_that_exist_are_refused(source, ids, tmp_path):
    (tmp_path / "stats").touch()
    assert "exists" in refused(PlanError, source, ids, (6,), statistics=tmp_path / "stats").message


def test_too_little_memory_is_refused_before_the_model_runs(source, ids):
    assert "memory" in refused(PlanError, source, ids, (6,), max_memory=1000).message


def test_without_sizes_the_default_grid_is_drawn(source, ids):
    sizes = {(point.experts, point.expert_width) for point in draw(source, ids, ()).points}
    assert {experts for experts, _ in sizes} == {8, 6, 4}
    assert len(sizes) == 9


def test_a_law_finds_itself_again():
    law = RatioLaw(scale=4.0, power=3.0)
    errors = [0.2, 0.3, 0.5]
    found = RatioLaw.fit(errors, [law.ratio(error) for error in errors])
    assert (found.scale, found.power) == pytest.approx((4, 3))
    assert leave_one_out(errors, [law.ratio(error) for error in errors]) == pytest.approx(
        [law.ratio(error) for error in errors]
    )
    assert law.ratio(0) == 1


def test_a_law_needs_two_points_that_cost_something():
    assert RatioLaw.fit([0.2, 0.3], [1.1, 0.99]) is None
    assert RatioLaw.fit([0.2, 0.2], [1.1, 1.2]) is None
    assert leave_one_out([0.2, 0.3], [1.1, 1.2]) == [None, None]


def test_a_law_of_points_that_are_close_together_predicts_nothing_far_from_them():
    assert RatioLaw(scale=1e30, power=100.0).ratio(0.9) is None
    assert RatioLaw(scale=1e30, power=100.0).ratio(0.1) == 1
    assert RatioLaw.fit([0.2, 0.2000001], [1.1, 1.5]) is None


def test_an_error_of_prediction_is_a_share_of_the_excess():
    assert excess_error(1.3, 1.2) == pytest.approx(0.5)
