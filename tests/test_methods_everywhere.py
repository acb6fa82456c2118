"""Every architecture with methods of every kind: each converts to a sound result, or is refused for a known reason.

Two layers of a tiny model take no time, but sixty architectures times all methods would. Each architecture goes through
a few methods, the next one through the next few, so that every method runs on architectures of every kind.
"""

from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import ENCODER_DECODER, EXPERTS, SUPPORTED, VOCABULARY, save_tiny
from tiny_models import read_tensors

from hcsmoe_hub import CalibrationOptions, ConvertOptions, MethodOptions, convert
from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.options import (
    Align,
    AlignTo,
    Budget,
    Clustering,
    Distance,
    Dominant,
    Features,
    Layout,
    Linkage,
    Merge,
    Preset,
    RouterPolicy,
    Saliency,
    Similarity,
)

KEPT = 3
LOGITS, WEIGHTS = (Similarity.ROUTER_LOGITS,), (Similarity.WEIGHT, Similarity.ROUTER_WEIGHT)

REDUCING: dict[str, MethodOptions] = {
    "zipit": MethodOptions(merge=Merge.ZIPIT),
    "mapped": MethodOptions(layout=Layout.MAPPED),
    "default": MethodOptions(),
    "loss-mapped": MethodOptions(linkage=Linkage.LOSS, merge=Merge.NEURONS, layout=Layout.MAPPED),
    "best-neurons": MethodOptions(preset=Preset.HC_SMOE, merge=Merge.NEURONS, router=RouterPolicy.AVERAGE),
    "fix-dom": MethodOptions(merge=Merge.FIX_DOM, features=Features.WEIGHT),
    "budget": MethodOptions(layout=Layout.FULL, budget=Budget.FREQUENCY),
    "align-weight": MethodOptions(align=Align.WEIGHT, align_to=AlignTo.FIRST),
    "reap": MethodOptions(preset=Preset.REAP),
    "align-activation": MethodOptions(align=Align.ACTIVATION, merge=Merge.SALIENCY, router=RouterPolicy.AVERAGE),
    "fuzzy": MethodOptions(clustering=Clustering.FUZZY),
    "one-to-one": MethodOptions(merge=Merge.FIX_DOM_ONE_TO_ONE, features=Features.ACTIVATION_WEIGHT),
    "single-shot": MethodOptions(clustering=Clustering.SINGLE_SHOT, similarity=LOGITS),
    "reconstruction": MethodOptions(preset=Preset.REAP, saliency=Saliency.RECONSTRUCTION),
    "kmeans": MethodOptions(clustering=Clustering.KMEANS, similarity=WEIGHTS, router=RouterPolicy.FREQUENCY),
    "router-fit": MethodOptions(preset=Preset.HC_SMOE, router=RouterPolicy.FIT),
    "overlap": MethodOptions(
        clustering=Clustering.SINGLE_SHOT, distance=Distance.WASSERSTEIN, dominant=Dominant.ROUTING_SCORE
    ),
}
IDENTICAL: dict[str, MethodOptions] = {
    "zipit": MethodOptions(merge=Merge.ZIPIT),
    "fuzzy": MethodOptions(clustering=Clustering.FUZZY),
    "align": MethodOptions(align=Align.ACTIVATION, merge=Merge.AVERAGE, router=RouterPolicy.AVERAGE),
    "full": MethodOptions(layout=Layout.FULL, clustering=Clustering.KMEANS),
    "prune": MethodOptions(preset=Preset.REAP, saliency=Saliency.ROUTING_SCORE),
    "fit": MethodOptions(preset=Preset.HC_SMOE, router=RouterPolicy.FIT),
    "default": MethodOptions(),
}
# Architectures whose blocks differ from all others where methods look: each goes through every method.
SPECIAL = ("gemma4_text", "llama4_text", "deepseek_v4", "zaya", "gpt_oss", "dbrx", *ENCODER_DECODER)
METHODS_EACH = 2

TABLE = "sends tokens to fixed experts by a table, which may name experts that pruning removes"
WHOLE_LAYER = "runs the MoE block of a layer again on single tokens"
# Every refusal that there is.
REFUSED: dict[tuple[str, str], str] = {
    ("deepseek_v4", "reap"): TABLE,
    ("deepseek_v4", "reconstruction"): TABLE,
    ("deepseek_v4", "prune"): TABLE,
    ("gemma4_text", "reconstruction"): WHOLE_LAYER,
    ("gemma4_text", "budget"): WHOLE_LAYER,
    ("llama4_text", "reconstruction"): "the router weight multiplies an expert's input",
    ("llama4_text", "mapped"): "the mapped layout cannot hold",
    ("llama4_text", "loss-mapped"): "the mapped layout cannot hold",
}
# No statistics file: its statistics are collected anew by every conversion.
WITHOUT_FILE = "gemma4_text"


def rotated(names: list[str], number: int, count: int) -> list[str]:
    """``count`` names, further along the list with every architecture."""
    start = number * count % len(names)
    return list(islice(cycle(names), start, start + min(count, len(names))))


@dataclass(frozen=True)
class Case:
    """One architecture, saved with calibration tokens next to it."""

    model_type: str
    folder: Path

    def options(self, experts: int, name: str, method: MethodOptions) -> ConvertOptions:
        """Options of one conversion; the first one collects the statistics of all."""
        statistics = None if self.model_type == WITHOUT_FILE else self.folder / "statistics"
        calibration = CalibrationOptions(dataset=str(self.folder / "ids.npy"))
        return ConvertOptions(
            experts=experts,
            method=method,
            output=self.folder / f"{name}-{experts}",
            device="cpu",
            statistics=statistics,
            calibration=calibration,
        )

    def refusal(self, experts: int, name: str, method: MethodOptions) -> str | None:
        """Converts and checks what came out; the reason if it was refused."""
        options = self.options(experts, name, method)
        try:
            report = convert(self.folder / "source", options)
        except PlanError as error:
            assert not (self.folder / f"{name}-{experts}").exists()
            return error.message
        if experts < EXPERTS:
            assert sum(layer.experts for layer in report.layers) == experts * len(report.layers)
            errors = [layer.output_error for layer in report.layers]
            # A layer whose active experts all stay alone is not changed.
            assert 0 < max(errors) < 10, (name, errors)
            return None
        before, after = read_tensors(self.folder / "source"), read_tensors(self.folder / f"{name}-{experts}")
        assert before.keys() == after.keys()
        assert [key for key in before if not torch.equal(before[key], after[key])] == []
        assert all((layer.output_error, layer.router.top_k_agreement) == (0, 1) for layer in report.layers)
        return None


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_methods_convert_every_architecture_or_are_refused_for_a_known_reason(model_type: str, tmp_path: Path) -> None:
    save_tiny(model_type, tmp_path / "source")
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(3, VOCABULARY, (6, 12)))
    case, number = Case(model_type, tmp_path), SUPPORTED.index(model_type)
    is_special = model_type in SPECIAL
    methods = list(REDUCING) if is_special else rotated(list(REDUCING), number, METHODS_EACH)
    identities = list(IDENTICAL) if is_special else rotated(list(IDENTICAL), number, 1)
    found = {name: case.refusal(KEPT, name, REDUCING[name]) for name in methods}
    found |= {name: found.get(name) or case.refusal(EXPERTS, name, IDENTICAL[name]) for name in identities}
    reasons = {name: reason for name, reason in found.items() if reason is not None}
    expected = {name: reason for (refused, name), reason in REFUSED.items() if refused == model_type and name in found}
    assert reasons.keys() == expected.keys(), reasons
    assert [name for name, reason in expected.items() if reason not in reasons[name]] == []


def test_every_method_runs_on_architectures_that_are_not_special() -> None:
    ordinary = [number for number, name in enumerate(SUPPORTED) if name not in SPECIAL]
    assert {name for number in ordinary for name in rotated(list(REDUCING), number, METHODS_EACH)} == REDUCING.keys()
    assert {name for number in ordinary for name in rotated(list(IDENTICAL), number, 1)} == IDENTICAL.keys()
    assert set(SPECIAL) <= set(SUPPORTED)
