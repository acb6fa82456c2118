"""Tables and lines that several commands print; drawn from the documents that ``--json`` prints."""

from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any

from rich.table import Table
from rich.text import Text

from hcsmoe_hub.machine.units import format_bytes, format_change, format_count, format_plural, format_range
from hcsmoe_hub.options import Layout

Document = Mapping[str, Any]


def section(rows: Iterable[tuple[str, ...]], *, indent: int = 0) -> Table:
    """Labels with their values, in columns."""
    table = Table.grid(padding=(0, 2))
    for number, row in enumerate(rows):
        if number == 0:
            for _ in row:
                table.add_column()
        table.add_row(" " * indent + row[0], *row[1:])
    return table


def source_line(source: Document, *, moe_layers: int) -> Text:
    """Name, short revision and kind of a source."""
    revision = f" @ {source['revision'][:7]}" if source["revision"] else ""
    name = source.get("repo_id") or source["path"]
    layers = format_plural(moe_layers, "MoE layer")
    kind = f" ({source['model_type']}, {source['quantization'] or source['dtype']}, {layers})"
    return Text.assemble((name, "bold"), revision, kind, no_wrap=True, overflow="ignore")


def before_after(document: Document) -> Table:
    """Source and result side by side."""
    experts = document["experts"]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("", "SOURCE", "RESULT"):
        table.add_column(title, justify="right" if title else "left", min_width=10 if title else 19)
    table.add_column(justify="right")
    table.add_row("experts per layer", str(experts["before"]), *_experts_after(document))
    table.add_row("experts per token", str(experts["per_token_before"]), str(experts["per_token_after"]))
    for label, key, show in (
        ("parameters", "parameters", format_count),
        ("active per token", "active_parameters", format_count),
        ("weights", "weights_bytes", format_bytes),
        ("shards", "shards", str),
    ):
        if key in document:
            change = document[key]
            percent = "" if key == "shards" else format_change(change)
            table.add_row(label, show(change["before"]), show(change["after"]), percent)
    return table


def experts_left(document: Document) -> list[int]:
    """Experts left per layer, without copies."""
    if "layers" in document:
        return [layer["experts"] for layer in document["layers"]]
    return list(document.get("experts_by_layer", {}).values()) or [document["experts"]["after"]]


def _experts_after(document: Document) -> tuple[str, str]:
    """Experts per layer that a result stores, with a remark."""
    counts = experts_left(document)
    found = format_range(counts)
    if document["method"]["layout"] == Layout.FULL:
        return str(document["experts"]["before"]), f"{found} distinct"
    if not document.get("is_final", True):
        return found, "on average"
    return found, "" if len(set(counts)) == 1 else f"{fmean(counts):.1f} on average"
