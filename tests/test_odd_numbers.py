"""Models and texts that leave little to compute with: every method ends in finite numbers, and warns of nothing odd."""

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import build, change_tensors, options, read_tensors, token_ids
from torch import Tensor

from hcsmoe_hub import ConversionReport, MethodOptions, convert
from hcsmoe_hub.options import Clustering, Layout, Merge, Preset, Refit, Saliency

Tensors = dict[str, Tensor]

METHODS = {
    **{preset.value: MethodOptions(preset=preset) for preset in Preset},
    "down": MethodOptions(preset=Preset.HC_SMOE, refit=Refit.DOWN),
    "zipit": MethodOptions(preset=Preset.HC_SMOE, merge=Merge.ZIPIT),
    "fuzzy": MethodOptions(preset=Preset.HC_SMOE, clustering=Clustering.FUZZY),
    "k-means": MethodOptions(preset=Preset.HC_SMOE, clustering=Clustering.KMEANS),
    "gram": MethodOptions(preset=Preset.REAP, saliency=Saliency.GRAM),
    "omp": MethodOptions(preset=Preset.REAP, saliency=Saliency.OMP),
    "reconstruction": MethodOptions(preset=Preset.REAP, saliency=Saliency.RECONSTRUCTION),
}
# Layouts in which a single expert may be left.
METHODS |= {
    layout.value: MethodOptions(preset=Preset.HC_SMOE, layout=layout) for layout in (Layout.FULL, Layout.MAPPED)
}
# All text is one token, so that most experts have none; one token again and again makes Gram matrices of rank one.
TEXTS = {"one token": token_ids(1, 1), "one token again and again": torch.full((4, 16), 7)}


def identical_experts(tensors: Tensors) -> None:
    for name, values in tensors.items():
        head, found, tail = name.partition(".experts.")
        if found:
            values.copy_(tensors[f"{head}.experts.0.{tail.partition('.')[2]}"])


def router_of_zeros(tensors: Tensors) -> None:
    for name, values in tensors.items():
        if name.endswith("gate.weight"):
            values.zero_()


def expert_of_zeros(tensors: Tensors) -> None:
    for name, values in tensors.items():
        if ".experts.3." in name:
            values.zero_()


CHANGES: list[Callable[[Tensors], None]] = [identical_experts, router_of_zeros, expert_of_zeros]


def numbers(source: Path, method: str, *, ids: Tensor | None = None, experts: int = 4) -> ConversionReport:
    """Converts, and checks that all numbers of the result and of its report are finite."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        report = convert(source, options(source, experts, ids=ids, method=METHODS[method]))
    result = source.parent / "result"
    assert all(values.isfinite().all() for values in read_tensors(result).values())

    def refuse(constant: str) -> None:
        raise AssertionError(f"the report holds {constant}")

    json.loads((result / "hcsmoe.json").read_text(), parse_constant=refuse)
    assert all(math.isfinite(layer.output_error) for layer in report.layers)
    # A budget may give one layer more and another one fewer.
    assert sum(layer.experts for layer in report.layers) == experts * len(report.layers)
    return report


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("method", METHODS)
def test_a_single_token_is_enough_for_every_method(tmp_path: Path, method: str, text: str) -> None:
    numbers(build(tmp_path / "model"), method, ids=TEXTS[text])


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("method", METHODS)
def test_experts_that_are_alike_or_do_nothing_can_be_converted(
    tmp_path: Path, method: str, change: Callable[[Tensors], None]
) -> None:
    source = build(tmp_path / "model")
    change_tensors(source, change)
    numbers(source, method)


@pytest.mark.parametrize("method", [preset.value for preset in Preset])
def test_models_in_half_precision_can_be_converted(tmp_path: Path, method: str) -> None:
    numbers(build(tmp_path / "model", dtype=torch.float16), method)


@pytest.mark.parametrize("method", ["m-smoe", "full", "mapped"])
def test_a_single_expert_may_be_left_under_a_router_that_keeps_its_rows(tmp_path: Path, method: str) -> None:
    numbers(build(tmp_path / "model"), method, experts=1)


def test_equal_distances_are_decided_by_the_lowest_numbers(tmp_path: Path) -> None:
    source = build(tmp_path / "model")
    change_tensors(source, identical_experts)
    first, second = numbers(source, "hc-smoe"), None
    for _ in range(2):
        (tmp_path / "result").rename(tmp_path / f"before-{_}")
        second = numbers(source, "hc-smoe")
        assert [layer.labels for layer in second.layers] == [layer.labels for layer in first.layers]


def test_a_fit_that_nothing_judges_is_dropped(tmp_path: Path) -> None:
    report = numbers(build(tmp_path / "model"), "hc-refit", ids=TEXTS["one token"])
    assert [layer.refit.is_kept for layer in report.layers if layer.refit is not None] == [False, False]


def test_weights_in_half_precision_are_averaged_in_single_precision(tmp_path: Path) -> None:
    # The sum of eight such experts is beyond the largest number of float16; so is that of two.
    source = build(tmp_path / "model", dtype=torch.float16)

    def grow(tensors: Tensors) -> None:
        for name, values in tensors.items():
            if ".experts." in name and name.endswith("w1.weight"):
                values[0, 0] = 6e4

    change_tensors(source, grow)
    merged = {
        name: values
        for name, values in read_tensors(convert_to(source, "hc-smoe")).items()
        if ".experts." in name and name.endswith("w1.weight")
    }
    assert {float(values[0, 0]) for values in merged.values()} == {float(torch.tensor(6e4, dtype=torch.float16))}


def convert_to(source: Path, method: str) -> Path:
    """The folder of a result."""
    numbers(source, method)
    return source.parent / "result"
