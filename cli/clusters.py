"""The clusters of a result: a line per MoE layer, or one layer in detail."""

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hcsmoe_hub.cli.dendrogram import dendrogram, is_cut
from hcsmoe_hub.cli.output import format_mean, format_plural
from hcsmoe_hub.cli.reports import LayerResult, RefitResult, Result
from hcsmoe_hub.cli.summary import UNCHANGED, effort
from hcsmoe_hub.cli.tables import section

NOTHING = "-"


def overview(result: Result) -> RenderableType:
    """How a result was made, and what became of each layer."""
    rows = [
        ("made from", f"{result.origin} by {result.tool}"),
        ("method", result.method),
        ("calibration", result.calibration),
    ]
    return Group(Text("conversion", style="bold"), section(rows, indent=2), Text(), _layer_table(result.layers))


def _layer_table(layers: Sequence[LayerResult]) -> Table:
    is_reduced = any(layer.policy != UNCHANGED for layer in layers)
    titles = ["LAYER", "EXPERTS", "SILHOUETTE", "DUNN", "OUTPUT ERROR", "DEAD", "MERGE HEIGHTS"]
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
            f"{100 * layer.output_error:.1f} %",
            *([f"{100 * layer.top_k_agreement:.1f} %"] if is_reduced else []),
            str(len(layer.dead_experts)),
            _heights(layer),
        )
    if len(layers) > 1:
        table.add_row(
            "mean",
            format_mean((len(layer.dominant) for layer in layers), digits=1),
            format_mean(layer.silhouette for layer in layers),
            format_mean(layer.dunn for layer in layers),
            f"{format_mean((100 * layer.output_error for layer in layers), digits=1)} %",
            *([f"{format_mean((100 * layer.top_k_agreement for layer in layers), digits=1)} %"] if is_reduced else []),
            format_mean((len(layer.dead_experts) for layer in layers), digits=1),
            "",
            style="bold",
        )
    return table


def _heights(layer: LayerResult) -> str:
    heights = layer.merge_heights
    return f"{min(heights):.3g} to {max(heights):.3g}" if heights else NOTHING


def detail(layer: LayerResult, *, width: int, is_ascii: bool) -> RenderableType:
    """One layer: its clusters, their shares of the tokens, and the tree that they were cut from.

    Args:
        layer: What the report says of it.
        width: Characters per line that a drawing may use.
        is_ascii: Draw with letters only.
    """
    experts, clusters = len(layer.labels), len(layer.dominant)
    title = f"layer {layer.layer}: {format_plural(experts, 'source expert')}, {clusters} left"
    return Group(
        Text(title, style="bold"),
        section(_facts(layer), indent=2),
        Text(),
        _cluster_table(layer),
        *_drawing(layer, width=width, is_ascii=is_ascii),
    )


def _facts(layer: LayerResult) -> Iterator[tuple[str, str]]:
    for label, value in (("silhouette", layer.silhouette), ("Dunn index", layer.dunn)):
        if value is not None:
            yield label, format_mean([value])
    yield "output error", f"{100 * layer.output_error:.1f} %"
    if layer.policy == UNCHANGED:
        yield "router", UNCHANGED
    else:
        yield "router", f"{_rule(layer)}, top-k agreement {100 * layer.top_k_agreement:.1f} %"
    if layer.refit is not None:
        yield "refit", _refitted(layer.refit)
    yield "dead experts", ", ".join(map(str, layer.dead_experts)) or "none"
    pruned = [str(expert) for expert, label in enumerate(layer.labels) if label < 0]
    if pruned:
        yield "pruned", ", ".join(pruned)
    if layer.merge_heights:
        yield "merge heights", _heights(layer)


def _rule(layer: LayerResult) -> str:
    """How the rows of a reduced router came about, in words."""
    match layer.is_fitted, layer.top_k_agreement_before:
        case True, float(before):
            return f"fitted from {100 * before:.1f} %"
        case False, float():
            return "not fitted, as that was no better on held-out text"
        case False, None:
            return "not fitted, as there was nothing to fit"
    return layer.policy


def _refitted(refit: RefitResult) -> str:
    """What a refit did on held-out text, in words."""
    if not refit.is_kept:
        return "dropped, as the error on held-out text did not fall"
    before, after = (100 * error for error in (refit.error_before, refit.error_after))
    text = f"error on held-out text from {before:.1f} to {after:.1f} %"
    return text if refit.rounds is None else f"{text} {effort([refit.rounds], [refit.steps or 0])}"


def _cluster_table(layer: LayerResult) -> Table:
    total = sum(layer.usage) or 1
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("CLUSTER", justify="right")
    table.add_column("EXPERTS, * LEADS")
    table.add_column("USAGE", justify="right", no_wrap=True)
    table.add_column("OF EACH EXPERT, %")
    for number, members in enumerate(layer.members()):
        lead = layer.dominant[number]
        table.add_row(
            str(number),
            ", ".join(f"{expert}*" if expert == lead and len(members) > 1 else str(expert) for expert in members),
            f"{100 * sum(layer.usage[expert] for expert in members) / total:.1f} %",
            ", ".join(f"{100 * layer.usage[expert] / total:.1f}" for expert in members),
        )
    return table


def _drawing(layer: LayerResult, *, width: int, is_ascii: bool) -> Iterator[RenderableType]:
    if not layer.tree:
        return
    yield Text()
    for line in dendrogram(layer.tree, layer.labels, width, is_ascii=is_ascii):
        yield Text(line, no_wrap=True, overflow="ignore")
    if not is_cut(layer.tree, layer.labels):
        yield Text("The size limit moved experts after the tree was cut.", style="dim")
