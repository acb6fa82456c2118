"""Tables and lines that several commands print; drawn from the documents that ``--json`` prints."""

from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any

from rich.table import Table
from rich.text import Text

from hcsmoe_hub.machine.units import (
    format_bytes,
    format_change,
    format_count,
    format_percent,
    format_plural,
    format_range,
)
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
    if is_open(document):
        table.add_row("neurons per expert", "", _of_candidates(document, "width"), "open")
    elif "width_after" in experts:
        table.add_row("neurons per expert", str(experts["width_before"]), str(experts["width_after"]))
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
    if is_open(document):
        return _of_candidates(document, "experts"), "open"
    if not document.get("is_final", True):
        return found, "on average"
    return found, "" if len(set(counts)) == 1 else f"{fmean(counts):.1f} on average"


def is_open(document: Document) -> bool:
    """Whether several shapes of experts meet a target, and none is chosen yet."""
    return "target" in document and document["target"]["chosen"] is None


def _of_candidates(document: Document, name: str) -> str:
    """The range of a number of the candidates."""
    return format_range(candidate[name] for candidate in document["target"]["candidates"])


def candidates(target: Document) -> Table:
    """The shapes of experts that meet a target, one per line, the chosen one marked."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    has_errors = target["candidates"][0]["predicted_error"] is not None
    for title in (
        "EXPERTS",
        "NEURONS",
        "PARAMETERS",
        "ACTIVE",
        "WEIGHTS",
        *(("PREDICTED LOSS",) if has_errors else ()),
    ):
        table.add_column(title, justify="right")
    table.add_column()
    for number, candidate in enumerate(target["candidates"]):
        error = (format_percent(candidate["predicted_error"]),) if has_errors else ()
        table.add_row(
            str(candidate["experts"]),
            str(candidate["width"]),
            format_count(candidate["parameters"]),
            format_count(candidate["active_parameters"]),
            format_bytes(candidate["weights_bytes"]),
            *error,
            "chosen" if number == target["chosen"] else "",
        )
    return table
