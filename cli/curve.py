"""``hcsmoe curve``: size against quality for several numbers and widths of experts, without writing any weights."""

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hcsmoe_hub.cli import options as cli
from hcsmoe_hub.cli.groups import grouped
from hcsmoe_hub.cli.libraries import collector_paused, prepare_libraries
from hcsmoe_hub.cli.output import Output
from hcsmoe_hub.cli.progress import listening
from hcsmoe_hub.cli.summary import calibration_line
from hcsmoe_hub.cli.tables import Document
from hcsmoe_hub.cli.values import parse_counts, parse_widths
from hcsmoe_hub.curve import curve as measure
from hcsmoe_hub.machine.units import format_bytes, format_count, format_percent
from hcsmoe_hub.options import CurveOptions

CURVE_EXAMPLES = """Examples:
$ hcsmoe curve Qwen/Qwen3-30B-A3B --experts 96,64,48 --expert-width 100%,75%,50%
$ hcsmoe curve ./my-mixtral --figure curve.png --statistics my-mixtral.stats
$ hcsmoe convert ./my-mixtral --experts 6 --expert-width 75% --statistics my-mixtral.stats"""
NOTHING = "-"
# Columns of domains, the worst first; --json has all of them.
SHOWN_DOMAINS = 4

ExpertCountsOption = Annotated[
    tuple[int, ...] | None,
    typer.Option(
        "--experts",
        "-e",
        parser=parse_counts,
        metavar="K,K,...",
        show_default="all; without --expert-width all, three quarters and half",
        help="Experts to keep in every MoE layer.",
    ),
]
WidthsOption = Annotated[
    tuple[int | str, ...] | None,
    typer.Option(
        "--expert-width",
        parser=parse_widths,
        metavar="W,W,...",
        show_default="100%; without --experts 100%, 75% and 50%",
        help="Neurons to keep in every expert, or shares of them. The points are all combinations with --experts.",
    ),
]
MeasurePointsOption = Annotated[
    int | None,
    typer.Option(
        "--measure-points",
        min=3,
        metavar="N",
        show_default="all",
        help="Points whose perplexity is measured, spread over the sizes; that of the others is predicted from these.",
    ),
]
FigureOption = Annotated[
    Path | None,
    typer.Option(
        "--figure",
        metavar="FILE",
        show_default=False,
        help="Draw size against perplexity into this PNG file; needs hcsmoe[plots].",
    ),
]
QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", metavar="", help="Print only a line per point: experts, width, bytes, ratio.")
]


@dataclass(frozen=True, slots=True, kw_only=True)
class CurveTextFlags(cli.TextFlags):
    """Which text the points are made and measured on."""

    samples: Annotated[
        int | None,
        typer.Option(
            "--samples",
            min=1,
            metavar="N",
            rich_help_panel="Calibration",
            show_default="65536 tokens, or 131072 with --statistics",
            help="Sequences of calibration text.",
        ),
    ] = None
    statistics: Annotated[
        Path | None,
        typer.Option(
            "--statistics",
            metavar="FILE",
            rich_help_panel="Calibration",
            show_default=False,
            help="Save calibration statistics here, from which hcsmoe convert makes any of the points.",
        ),
    ] = None


@grouped
def curve(
    source: cli.SourceArgument,
    *,
    experts: ExpertCountsOption = None,
    expert_width: WidthsOption = None,
    measure_points: MeasurePointsOption = None,
    figure: FigureOption = None,
    as_json: cli.JsonOption = False,
    quiet: QuietOption = False,
    text: CurveTextFlags,
    compute: cli.ComputeFlags,
    hub: cli.Hub,
) -> None:
    """Compare sizes: bytes against perplexity for several numbers and widths of experts, from one pass.

    No weights are written.
    Points are what hcsmoe convert --refit none --propagate original makes.
    LOST is predicted from the neurons' energies on calibration text.
    ERROR, of single layers, and RATIO are measured on held-out text.
    PREDICTED is the ratio that ERROR predicts, fitted to the other points.
    """
    options = CurveOptions(
        experts=experts or (),
        expert_width=expert_width or (),
        measure_points=measure_points,
        calibration=text.options(),
        device=compute.device,
        batch_tokens=compute.batch_tokens,
        max_memory=compute.limits(),
        statistics=text.statistics,
        keep_states=not text.no_states,
        figure=figure,
    )
    sink = Output(as_json=as_json, quiet=quiet)
    with collector_paused():
        prepare_libraries()
    with listening(sink) as listener:
        document = measure(source, options, listener=listener, **hub.arguments()).as_dict()
    sink.result(document, human=_figures(document), brief="\n".join(map(_line, document["points"])))
    if figure is not None:
        sink.hint(f"the figure is {figure}")
    if text.statistics is not None:
        sink.hint(f"make any of the points with 'hcsmoe convert ... --statistics {text.statistics}'")


def _ratio(point: Document) -> float | None:
    """The measured ratio, or else the predicted one."""
    measured = point["measured"]
    ratio: float | None = point["predicted_ratio"] if measured is None else measured["overall"]["ratio"]
    return ratio


def _line(point: Document) -> str:
    """A point for a script: experts, width, bytes and ratio, with tabs between them."""
    values = (point["experts"], point["expert_width"], point["weights_bytes"], _shown(_ratio(point), ".6g"))
    return "\t".join(map(str, values))


def _shown(value: float | None, form: str = ".3f") -> str:
    return NOTHING if value is None else format(value, form)


def _figures(document: Document) -> RenderableType:
    domains = _domains(document)
    table = Table(box=None, pad_edge=False, header_style="bold")
    titles = ("EXPERTS", "WIDTH", "PARAMETERS", "ACTIVE", "WEIGHTS", "LOST", "ERROR", "PREDICTED", "RATIO", "SAME TOP")
    for title in (*titles, *(domain.upper() for domain in domains)):
        table.add_column(title, justify="right", no_wrap=True)
    for point in document["points"]:
        table.add_row(*_row(point, domains))
    source = document["source"]
    name = Text.assemble((source.get("repo_id") or source["path"], "bold"), f" ({source['model_type']})")
    return Group(name, Text(), table, Text(), *(Text(line, style="dim") for line in _notes(document, domains)))


def _domains(document: Document) -> list[str]:
    """The domains that the points lose most on."""
    found: dict[str, list[float]] = {}
    for point in document["points"]:
        for domain, row in (point["measured"] or {"domains": {}})["domains"].items():
            found.setdefault(domain, []).append(row["ratio"])
    return sorted(found, key=lambda domain: -fmean(found[domain]))[:SHOWN_DOMAINS] if len(found) > 1 else []


def _row(point: Document, domains: list[str]) -> list[str]:
    measured = point["measured"]
    cells = [
        str(point["experts"]),
        str(point["expert_width"]),
        format_count(point["parameters"]),
        format_count(point["active_parameters"]),
        format_bytes(point["weights_bytes"]),
        format_percent(fmean(layer["predicted_loss"] for layer in point["layers"])),
        format_percent(fmean(layer["output_error"] for layer in point["layers"])),
        _shown(point["predicted_ratio"]),
    ]
    if measured is None:
        return [*cells, *[NOTHING] * (2 + len(domains))]
    overall = measured["overall"]
    cells += [_shown(overall["ratio"]), format_percent(overall["top1_agreement"])]
    return [*cells, *(_shown(measured["domains"][domain]["ratio"]) for domain in domains)]


def _notes(document: Document, domains: list[str]) -> list[str]:
    notes = [
        f"Calibration: {calibration_line(document['calibration'])}. Every point as converted with --refit none "
        "--propagate original.",
    ]
    prediction = document["prediction"]
    if prediction is not None and prediction["mean_error"] is not None:
        notes.append(
            f"Predicted from the errors of single layers and the other points: off by "
            f"{format_percent(prediction['mean_error'])} of the measured excess on average, "
            f"{format_percent(prediction['worst_error'])} at worst."
        )
    if domains:
        notes.append("Last columns: ratios of the domains that lose most; --json has all of them.")
    return notes
