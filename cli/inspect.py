"""``hcsmoe inspect``: what a checkpoint is made of, and what fewer experts would save; reads headers only."""

import shlex

from rich.console import Group, RenderableType
from rich.text import Text

from hcsmoe_hub.cli import options as cli
from hcsmoe_hub.cli.documents import model_document
from hcsmoe_hub.cli.libraries import prepare_libraries
from hcsmoe_hub.cli.output import Output, format_plural
from hcsmoe_hub.cli.tables import Document, section, source_line
from hcsmoe_hub.units import format_bytes, format_count


def inspect(
    source: cli.SourceArgument,
    as_json: cli.JsonOption = False,
    revision: cli.RevisionOption = None,
    token: cli.TokenOption = None,
    cache_dir: cli.CacheDirOption = None,
) -> None:
    """Show a checkpoint's experts, router and sizes; reads headers only."""
    sink = Output(as_json=as_json)
    hub = cli.Hub(revision=revision, token=token, cache_dir=cache_dir)
    prepare_libraries()
    with sink.working("Reading headers"):
        from hcsmoe_hub.checkpoint.source import open_source
        from hcsmoe_hub.model import read_model

        document = model_document(read_model(open_source(source, **hub.arguments())))
    sink.result(document, human=_summary(document))
    if document["projections"]:
        experts = document["projections"][-1]["experts"]
        sink.hint(f"'hcsmoe convert {shlex.quote(source)} --experts {experts} --dry-run' says what that would need")


def _summary(document: Document) -> RenderableType:
    """A checkpoint and what fewer experts would leave of it."""
    source, experts, parameters = document["source"], document["experts"], document["parameters"]
    share = 100 * parameters["experts"] / parameters["total"]
    stored = source["quantization"] or source["dtype"]
    groups = f", in {experts['groups']} groups" if experts["groups"] > 1 else ""
    rows = [
        ("architecture", document["architecture"]),
        ("router", "; ".join(filter(None, (document["router"], document["note"])))),
        ("layers", f"{experts['moe_layers']} of {format_plural(experts['layers'], 'decoder layer')} are MoE layers"),
        ("experts", f"{experts['per_layer']} per layer, {experts['per_token']} per token{groups}"),
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
