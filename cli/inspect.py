"""``hcsmoe inspect``: what a checkpoint is made of, what fewer experts would save, and how a result was made."""

import shlex
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from hcsmoe_hub.cli import options as cli
from hcsmoe_hub.cli.clusters import detail, measures_loss, overview
from hcsmoe_hub.cli.documents import model_document
from hcsmoe_hub.cli.groups import grouped
from hcsmoe_hub.cli.libraries import prepare_libraries
from hcsmoe_hub.cli.output import Output
from hcsmoe_hub.cli.tables import Document, section, source_line
from hcsmoe_hub.errors import PlanError, SourceError
from hcsmoe_hub.machine.units import format_bytes, format_count, format_plural, format_range
from hcsmoe_hub.recipe.read import read_recipe
from hcsmoe_hub.report import REPORT_FILE, ConversionReport, LayerReport

if TYPE_CHECKING:
    from hcsmoe_hub.checkpoint.source import Source

LayerOption = Annotated[
    int | None,
    typer.Option("--layer", min=0, metavar="N", show_default=False, help="Show the clusters of one layer of a result."),
]


@grouped
def inspect(
    source: cli.SourceArgument, *, layer: LayerOption = None, as_json: cli.JsonOption = False, hub: cli.Hub
) -> None:
    """Show experts, router and sizes, and the clusters of a result; reads headers only."""
    sink = Output(as_json=as_json)
    prepare_libraries()
    with sink.working("Reading headers"):
        from hcsmoe_hub.hub.open import open_source
        from hcsmoe_hub.model.source_model import read_model

        opened = open_source(source, **hub.arguments())
        document = model_document(read_model(opened))
        report = _report(opened, sink, is_needed=layer is not None)
    if layer is not None:
        assert report is not None, "a layer without a report is refused"
        chosen = _chosen(report, layer, label=opened.label)
        document["conversion"] = replace(report, layers=[chosen]).as_dict()
        human = detail(chosen, width=sink.drawing_width, is_ascii=sink.is_ascii, is_loss=measures_loss(report))
        sink.result(document, human=human)
        return
    document["conversion"] = None if report is None else report.as_dict()
    summary = _summary(document)
    sink.result(document, human=summary if report is None else Group(summary, Text(), overview(report)))
    path = shlex.quote(source)
    if report is not None:
        sink.hint(f"'hcsmoe inspect {path} --layer {report.layers[0].layer}' shows the clusters of one layer")
    elif document["projections"]:
        experts = document["projections"][-1]["experts"]
        sink.hint(f"'hcsmoe convert {path} --experts {experts} --dry-run' shows what that would need")


def _report(source: "Source", sink: Output, *, is_needed: bool) -> ConversionReport | None:
    """The report of a conversion; of a damaged one a warning, and the rest of the checkpoint is shown.

    Raises:
        SourceError: If the report is needed, and damaged.
        PlanError: If it is needed, and there is none.
    """
    if REPORT_FILE not in source.files():
        if is_needed:
            raise PlanError(
                f"{source.label} holds no {REPORT_FILE}, which records the clusters of every layer.",
                hint="name a result of 'hcsmoe convert', or leave --layer out",
            )
        return None
    # Imported on use: pydantic takes a tenth of a second.
    from hcsmoe_hub.report.read import read_report

    try:
        report = read_report(source.text(REPORT_FILE), label=f"{source.label}/{REPORT_FILE}")
        # A choice that only a newer version knows cannot be shown.
        read_recipe(report.method)
    except SourceError as error:
        if is_needed:
            raise
        sink.warn(error.message)
        return None
    return report


def _chosen(report: ConversionReport, layer: int, *, label: str) -> LayerReport:
    found = {known.layer: known for known in report.layers}
    if layer not in found:
        raise PlanError(
            f"layer {layer} of {label} is not one of its {len(found)} MoE layers: {', '.join(map(str, found))}.",
            hint="use --layer with one of them",
        )
    return found[layer]


def _experts(experts: Document) -> str:
    """How many experts a layer has, how wide they are, and how many are active per token."""
    groups = f", in {experts['groups']} groups" if experts["groups"] > 1 else ""
    tail = f"{experts['width']} neurons each, {experts['per_token']} per token{groups}"
    if "factors" in experts:
        sizes = experts["factors"]
        rows = f" and {sizes['incoming_rows']} + {sizes['outgoing_rows']} whole rows" if sizes["incoming_rows"] else ""
        tail += f", of factors of rank {sizes['rank']}{rows}"
    if "stored_by_layer" not in experts:
        return f"{experts['per_layer']} per layer, {tail}"
    stored = format_range(list(experts["stored_by_layer"].values()))
    return f"{experts['per_layer']} router rows share {stored} experts per layer, {tail}"


def _layers(experts: Document) -> str:
    """How many layers have experts, those of an encoder and of a decoder apart; they are numbered through."""
    if "encoder" in experts:
        counts = ((name, experts[name]["moe_layers"], experts[name]["layers"]) for name in ("encoder", "decoder"))
        words = " and ".join(f"{found} of {layers} {name} layers" for name, found, layers in counts)
        return f"{words} are MoE layers; numbers of decoder layers begin at {experts['encoder']['layers']}"
    words = f"{experts['moe_layers']} of {format_plural(experts['layers'], 'decoder layer')} are MoE layers"
    return f"{words}, and so is the multi-token prediction head" if "mtp_layers" in experts else words


def _summary(document: Document) -> RenderableType:
    """A checkpoint, and what would be left of it with fewer experts."""
    source, experts, parameters = document["source"], document["experts"], document["parameters"]
    share = 100 * parameters["experts"] / parameters["total"]
    stored = source["quantization"] or source["dtype"]
    rows = [
        ("architecture", document["architecture"]),
        ("router", "; ".join(filter(None, (document["router"], document["note"])))),
        ("layers", _layers(experts)),
        ("experts", _experts(experts)),
        (
            "parameters",
            f"{format_count(parameters['total'])}, {share:.0f} % in experts, "
            f"{format_count(parameters['active'])} active per token",
        ),
        (
            "weights",
            f"{format_bytes(document['weights_bytes'])} {stored} in {format_plural(document['shards'], 'shard')}",
        ),
    ]
    projected = [
        (
            f"--experts {kept['experts']}",
            f"about {format_count(kept['parameters'])} parameters, {format_bytes(kept['weights_bytes'])}",
        )
        for kept in document["projections"]
    ]
    blocks: list[RenderableType] = [source_line(source, moe_layers=experts["moe_layers"]), section(rows, indent=2)]
    if projected:
        blocks += [Text(), section(projected, indent=2)]
    return Group(*blocks)
