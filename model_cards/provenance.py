"""How a result was made: the calibration text, the router, the refit, and every layer."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from hcsmoe_hub.calibration.token_ids import holds_token_ids
from hcsmoe_hub.machine.units import format_bytes, format_list, format_percent, format_plural, format_range
from hcsmoe_hub.model_cards.card_data import CardData
from hcsmoe_hub.model_cards.quality import NOTHING, Table
from hcsmoe_hub.options import Layout
from hcsmoe_hub.report import LayerReport, RefitReport, RouterReport

DATASETS = {
    "bundled": "the text that comes with hcsmoe (English prose, manuals and code)",
    "c4": "C4, English (`allenai/c4`)",
}
SHOWN_WARNINGS = 10
# The id, and the names of config and split.
_HUB_DATASET = re.compile(r"([\w.-]+/[\w.-]+)(?::[^:]*){0,2}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """What a fit brought in the layers that kept it.

    Attributes:
        kept: Layers that kept it.
        tried: Layers in which it was tried.
        before: Mean over the layers that kept it, without it; empty if there are none.
        after: The same with it.
        work: Of a refit, its rounds and steps in words.
    """

    kept: int
    tried: int
    before: str = ""
    after: str = ""
    work: str = ""


def calibration_text(card: CardData) -> str:
    """The calibration set, without its size."""
    calibration = card.report.calibration
    if "sources" in calibration:
        parts = [f"{format_percent(each['share'])} {text_of(each['dataset'])}" for each in calibration["sources"]]
        return f"{', '.join(parts[:-1])} and {parts[-1]}"
    name = calibration["dataset"]
    return f"the token ids in `{name}`" if holds_token_ids(name) else text_of(name)


def text_of(name: str) -> str:
    """One source of text; a dataset of the Hub as a link."""
    if name in DATASETS:
        return DATASETS[name]
    dataset = hub_dataset(name)
    return f"`{name}`" if dataset is None else f"[{name}](https://huggingface.co/datasets/{dataset})"


def hub_dataset(name: str) -> str | None:
    """The dataset of the Hub that a source of text is, without configuration and split; ``None`` if it is not one."""
    if name == "c4":
        return "allenai/c4"
    found = _HUB_DATASET.fullmatch(name)
    return None if found is None else found[1]


def is_shuffled(card: CardData) -> bool:
    """Whether a seed decided which documents the calibration set has."""
    return not holds_token_ids(card.report.calibration["dataset"])


def mean_agreement(card: CardData) -> str:
    """Top-k agreement, mean over layers."""
    return format_percent(fmean(layer.router.top_k_agreement for layer in card.layers))


def mean_change(card: CardData) -> str:
    """Output error, mean over the layers that have fewer experts; empty if there are none."""
    return format_percent(fmean(layer.output_error for layer in card.changed)) if card.changed else ""


def router_gain(card: CardData) -> Gain:
    """What the fit of the router brought."""
    tried = [layer.router for layer in card.layers if layer.router.top_k_agreement_before is not None]
    kept = [router for router in tried if router.is_fitted]
    if not kept:
        return Gain(kept=0, tried=len(tried))
    before = fmean(_agreement_before(router) for router in kept)
    after = fmean(router.top_k_agreement for router in kept)
    return Gain(kept=len(kept), tried=len(tried), before=format_percent(before), after=format_percent(after))


def _agreement_before(router: RouterReport) -> float:
    assert router.top_k_agreement_before is not None, "only fits that were tried are counted"
    return router.top_k_agreement_before


def refit_gain(card: CardData) -> Gain:
    """What the refit brought."""
    tried = sum(layer.refit is not None for layer in card.layers)
    kept = card.refits
    if not kept:
        return Gain(kept=0, tried=tried)
    before, after = (
        fmean(errors) for errors in zip(*((each.error_before, each.error_after) for each in kept), strict=True)
    )
    return Gain(
        kept=len(kept), tried=tried, before=format_percent(before), after=format_percent(after), work=_work(kept)
    )


def training_gain(card: CardData) -> str:
    """How near the base model its logits brought the result, domain by domain: ``from 0.42 to 0.38 nats per token``."""
    assert card.training is not None, "only a training that was kept is described"
    changes = [
        (domain.domain, f"from {domain.kl_before:.3g} to {domain.kl_after:.3g}") for domain in card.training.domains
    ]
    if len(changes) == 1:
        return f"{changes[0][1]} nats per token"
    return format_list([f"{change} nats per token in {name}" for name, change in changes])


def _work(refits: Sequence[RefitReport]) -> str:
    """Rounds and steps of refits: ``1 to 7 rounds of least squares``; empty for reports that do not count them."""
    rounds = format_range(refit.rounds or 0 for refit in refits)
    steps = format_range(refit.steps for refit in refits)
    counts = ((rounds, "round{} of least squares"), (steps, "step{} of gradient descent"))
    return " and ".join(f"{count} {what.format('' if count == '1' else 's')}" for count, what in counts if count != "0")


def others_choices(card: CardData) -> str:
    """Whose choices were applied: the other result as a link, or its name; empty if they were made here."""
    like = card.report.like
    if like is None:
        return ""
    if "repo_id" not in like:
        return f"`{like.get('path', 'another result')}`"
    commit = "" if like["revision"] is None else f"/tree/{like['revision']}"
    return f"[{like['repo_id']}](https://huggingface.co/{like['repo_id']}{commit})"


def dropped_tensors(card: CardData) -> dict[str, str]:
    """Tensors that were left out, counted, by the reason."""
    reasons = Counter(card.report.dropped_tensors.values())
    return {reason: format_plural(count, "tensor") for reason, count in reasons.items()}


def cost(card: CardData) -> str:
    """Time and peak memory of the run."""
    peaks = card.report.peak_memory_bytes
    parts = [f"{sum(card.report.timings_seconds.values()):.0f} s"]
    parts += [f"at most {format_bytes(peaks['process'])} of memory"] if "process" in peaks else []
    parts += [f"{format_bytes(peak)} on {device}" for device, peak in peaks.items() if device != "process"]
    return ", ".join(parts)


def layer_table(card: CardData) -> Table:
    """Every layer in a row."""
    has_router = card.layout in (Layout.REDUCED, Layout.FACTORED)
    has_refit = any(layer.refit is not None for layer in card.layers)
    titles = ["layer", "experts", "pruned" if card.is_pruned else "largest cluster"]
    titles += ["top-k agreement"] if has_router else []
    titles += ["output error", "experts without tokens"]
    titles += ["held-out error of the refit"] if has_refit else []
    rows = []
    for number, layer in enumerate(card.layers, start=1):
        name = f"{layer.layer} (MTP head)" if number > len(card.layers) - card.mtp_layers else str(layer.layer)
        count = len(layer.pruned) if card.is_pruned else max(map(len, layer.members()))
        row = [name, str(layer.experts), str(count)]
        row += [format_percent(layer.router.top_k_agreement)] if has_router else []
        row += [format_percent(layer.output_error), str(len(layer.dead_experts))]
        rows.append([*row, *([_held_out(layer)] if has_refit else [])])
    return Table(titles, rows)


def _held_out(layer: LayerReport) -> str:
    """What the refit of a layer did to the error on tokens that it was not fitted to."""
    if layer.refit is None:
        return NOTHING
    before, after = format_percent(layer.refit.error_before), format_percent(layer.refit.error_after)
    return f"{before} to {after}" if layer.refit.is_kept else f"{before}, dropped"
