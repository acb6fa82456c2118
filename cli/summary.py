"""What a person sees of a plan and of a finished conversion; drawn from the documents that ``--json`` prints."""

from collections import Counter
from collections.abc import Mapping
from statistics import fmean

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hcsmoe_hub.cli.output import format_plural, format_seconds
from hcsmoe_hub.cli.tables import Document, before_after, section, source_line
from hcsmoe_hub.units import format_bytes


def method_line(method: Document) -> str:
    """Every choice of the method, in words."""
    return (
        f"{method['similarity']}, {method['distance']} distance, {method['clustering']} clustering, "
        f"{method['linkage']} linkage, {method['merge']} merge, {method['router']} router, {method['layout']} layout"
    )


def calibration_line(calibration: Document) -> str:
    """The calibration set, in words."""
    size = f"{calibration['sequences']} x {calibration['sequence_length']} tokens"
    return f"{calibration['dataset']}, {size}, seed {calibration['seed']}"


def _needs(needs: Document, room: Document) -> Table:
    download, seconds = needs["download_bytes"], needs["seconds"]
    rows = [
        ("download", format_bytes(download) if download else "nothing", ""),
        ("disk", format_bytes(needs["disk_bytes"]), f"{format_bytes(room['disk_bytes'])} free on {room['disk']}"),
        ("memory", format_bytes(needs["memory_bytes"]), f"{format_bytes(room['memory_bytes'])} available"),
    ]
    if needs["device_bytes"]:
        device = f"{format_bytes(room['device_bytes'])} free on {room['device']}"
        rows.append(("device", format_bytes(needs["device_bytes"]), device))
    if seconds is not None:
        time = "seconds" if seconds < 10 else f"about {format_seconds(seconds)}"
        rows.append(("time", time, "without the download" if download else ""))
    return section(rows, indent=2)


def dry_run(document: Document, room: Document) -> RenderableType:
    """A plan.

    Args:
        document: The plan as ``--json`` prints it.
        room: What this machine has: ``disk_bytes`` on ``disk``, ``memory_bytes``, ``device_bytes`` on ``device``.
    """
    rows = [
        ("method", method_line(document["method"])),
        ("calibration", calibration_line(document["calibration"])),
        ("output", document["output"]),
    ]
    rows += [("dropped", reason) for reason in _dropped(document["dropped_tensors"])]
    return Group(
        source_line(document["source"], moe_layers=document["experts"]["moe_layers"]),
        Text(),
        before_after(document),
        Text(),
        Text("needs", style="bold"),
        _needs(document["needs"], room),
        Text(),
        section(rows),
        Text(),
        Text("Nothing was downloaded or written."),
    )


def _dropped(dropped: Mapping[str, str]) -> list[str]:
    """One line per reason."""
    return [f"{format_plural(count, 'tensor')}: {reason}" for reason, count in Counter(dropped.values()).items()]


def conversion(document: Document, *, check_mark: str, seconds: float) -> RenderableType:
    """A finished conversion, from its report, and how long it took."""
    experts, layers = document["experts"], document["layers"]
    agreement = fmean(layer["router"]["top_k_agreement"] for layer in layers)
    error = fmean(layer["output_error"] for layer in layers)
    title = f"Converted to {experts['after']} experts per layer"
    return Group(
        Text.assemble((check_mark, "bold green"), (f" {title}", "bold"), f" in {format_seconds(seconds)}"),
        Text(f"  path: {document['output']}", no_wrap=True, overflow="ignore"),
        Text(),
        before_after(document),
        Text(),
        section(
            [
                (
                    "top-k agreement",
                    f"{100 * agreement:.1f} %",
                    "of the clusters that the full router chooses, the reduced one chooses too",
                ),
                ("output error", f"{100 * error:.1f} %", "of the norm of the routed experts' output"),
            ]
        ),
        Text(
            f"Mean over {format_plural(len(layers), 'MoE layer')} on the calibration text; no measure of quality.",
            style="dim",
        ),
    )
