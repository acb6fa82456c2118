"""The clusters of a result: a line per MoE layer, or one layer in detail."""

from collections.abc import Iterator, Sequence
from statistics import fmean

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hcsmoe_hub.cli.dendrogram import dendrogram, is_cut
from hcsmoe_hub.cli.recover_summary import training
from hcsmoe_hub.cli.summary import UNCHANGED, calibration_line, cost, effort
from hcsmoe_hub.cli.tables import section
from hcsmoe_hub.machine.units import format_mean, format_percent, format_plural
from hcsmoe_hub.options import Linkage
from hcsmoe_hub.recipe.read import read_recipe
from hcsmoe_hub.recipe.words import method_line
from hcsmoe_hub.report import ConversionReport, LayerReport, RefitReport

NOTHING = "-"


def overview(report: ConversionReport) -> RenderableType:
    """How a result was made, and a line per layer.

    Raises:
        SourceError: If the report names a choice that this version does not know.
    """
    source, tool = report.source, report.tool
    revision = source.get("revision")
    name = source.get("repo_id") or source.get("path") or "a folder"
    origin = f"{name} @ {revision[:7]}" if revision else name
    rows = [
        ("made from", f"{origin} by {tool['name']} {tool['version']}"),
        ("method", method_line(read_recipe(report.method))),
        ("calibration", calibration_line(report.calibration)),
        *((label, f"{value} {meaning}") for label, value, meaning in cost(report.as_dict()["measured"])),
        *([] if report.recovery is None else training(report.recovery)),
    ]
    table = _layer_table(report.layers, is_loss=measures_loss(report))
    return Group(Text("conversion", style="bold"), section(rows, indent=2), Text(), table)


def measures_loss(report: ConversionReport) -> bool:
    """Whether heights are shares of a layer's output energy that merges lost."""
    return report.method["linkage"] == Linkage.LOSS


def _layer_table(layers: Sequence[LayerReport], *, is_loss: bool) -> Table:
    is_reduced = any(layer.router.policy != UNCHANGED for layer in layers)
    titles = [
        "LAYER",
        "EXPERTS",
        "SILHOUETTE",
        "DUNN",
        "OUTPUT ERROR",
        "DEAD",
        "LOST BY MERGES" if is_loss else "MERGE HEIGHTS",
    ]
    if is_reduced:
        titles.insert(5, "TOP-K AGREEMENT")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for layer in layers:
        table.add_row(
            str(layer.layer),
            str(len(layer.dominant)),
            format_mean([layer.silhouette]),
            format_mean([layer.dunn]),
            format_percent(layer.output_error),
            *([format_percent(layer.router.top_k_agreement)] if is_reduced else []),
            str(len(layer.dead_experts)),
            _lost(layer) if is_loss else _heights(layer),
        )
    if len(layers) > 1:
        table.add_row(
            "mean",
            format_mean((len(layer.dominant) for layer in layers), digits=1),
            format_mean(layer.silhouette for layer in layers),
            format_mean(layer.dunn for layer in layers),
            format_percent(fmean(layer.output_error for layer in layers)),
            *(
                [f"{format_mean((100 * layer.router.top_k_agreement for layer in layers), digits=1)} %"]
                if is_reduced
                else []
            ),
            format_mean((len(layer.dead_experts) for layer in layers), digits=1),
            "",
            style="bold",
        )
    return table


def _heights(layer: LayerReport) -> str:
    heights = layer.merge_heights
    return f"{min(heights):.3g} to {max(heights):.3g}" if heights else NOTHING


def _lost(layer: LayerReport) -> str:
    """What all merges of a layer together lost of its output energy."""
    return format_percent(sum(layer.merge_heights)) if layer.merge_heights else NOTHING


def detail(layer: LayerReport, *, width: int, is_ascii: bool, is_loss: bool) -> RenderableType:
    """One layer: its clusters, their share of the tokens, and the tree that they were cut from.

    Args:
        layer: What the report says of it.
        width: Characters per line that a drawing may use.
        is_ascii: Draw with letters only.
        is_loss: Heights are shares of the layer's output energy that merges lost.
    """
    experts, clusters = len(layer.labels), len(layer.dominant)
    title = f"layer {layer.layer}: {format_plural(experts, 'source expert')}, {clusters} left"
    return Group(
        Text(title, style="bold"),
        section(_facts(layer, is_loss=is_loss), indent=2),
        Text(),
        _cluster_table(layer),
        *_drawing(layer, width=width, is_ascii=is_ascii, is_loss=is_loss),
    )


def _facts(layer: LayerReport, *, is_loss: bool) -> Iterator[tuple[str, str]]:
    for label, value in (("silhouette", layer.silhouette), ("Dunn index", layer.dunn)):
        if value is not None:
            yield label, format_mean([value])
    yield "output error", format_percent(layer.output_error)
    if layer.router.policy == UNCHANGED:
        yield "router", UNCHANGED
    else:
        yield "router", _router(layer)
    if layer.refit is not None:
        yield "refit", _refitted(layer.refit)
    yield "dead experts", ", ".join(map(str, layer.dead_experts)) or "none"
    if layer.pruned:
        yield "pruned", ", ".join(map(str, layer.pruned))
    if layer.merge_heights and is_loss:
        each = ", ".join(f"{100 * height:.3g}" for height in layer.merge_heights)
        yield "lost by merges", f"{_lost(layer)} of the output energy, merge by merge: {each} %"
    elif layer.merge_heights:
        yield "merge heights", _heights(layer)


def _router(layer: LayerReport) -> str:
    """How the rows of a reduced router were made and how well it agrees with the original one, in words."""
    router, agreement = layer.router, format_percent(layer.router.top_k_agreement)
    match router.is_fitted, router.top_k_agreement_before:
        case True, float(before):
            return f"fitted; top-k agreement {format_percent(before)} -> {agreement}"
        case False, float():
            return f"not fitted: the fit was no better on held-out text; top-k agreement {agreement}"
        case False, None:
            return f"not fitted: there was nothing to fit; top-k agreement {agreement}"
    return f"{router.policy}; top-k agreement {agreement}"


def _refitted(refit: RefitReport) -> str:
    """What a refit did on held-out text, in words."""
    if not refit.is_kept:
        return "dropped: held-out error did not fall"
    text = f"held-out error {format_percent(refit.error_before)} -> {format_percent(refit.error_after)}"
    return text if refit.rounds is None else f"{text} ({effort([refit.rounds], [refit.steps])})"


def _cluster_table(layer: LayerReport) -> Table:
    total = sum(layer.usage) or 1
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("CLUSTER", justify="right")
    table.add_column("EXPERTS (* = dominant)")
    table.add_column("USAGE", justify="right", no_wrap=True)
    table.add_column("PER EXPERT, %")
    for number, members in enumerate(layer.members()):
        lead = layer.dominant[number]
        table.add_row(
            str(number),
            ", ".join(f"{expert}*" if expert == lead and len(members) > 1 else str(expert) for expert in members),
            f"{100 * sum(layer.usage[expert] for expert in members) / total:.1f} %",
            ", ".join(f"{100 * layer.usage[expert] / total:.1f}" for expert in members),
        )
    return table


def _drawing(layer: LayerReport, *, width: int, is_ascii: bool, is_loss: bool) -> Iterator[RenderableType]:
    if not layer.tree:
        return
    yield Text()
    for line in dendrogram(layer.tree, layer.labels, width, is_ascii=is_ascii, is_share=is_loss):
        yield Text(line, no_wrap=True, overflow="ignore")
    if not is_cut(layer.tree, layer.labels):
        yield Text("The size limit moved experts after the tree was cut.", style="dim")
