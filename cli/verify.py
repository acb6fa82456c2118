"""``hcsmoe verify``: checks a checkpoint, and loads it in a fresh process."""

from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from hcsmoe_hub.cli import options as cli
from hcsmoe_hub.cli.groups import grouped
from hcsmoe_hub.cli.libraries import prepare_libraries
from hcsmoe_hub.cli.output import Output
from hcsmoe_hub.cli.tables import Document, section
from hcsmoe_hub.errors import SourceError
from hcsmoe_hub.machine.units import format_bytes, format_plural

AgainstOption = Annotated[
    str | None,
    typer.Option(
        "--against",
        metavar="SOURCE",
        show_default=False,
        help="Source that it was made from: tensors that the conversion left alone must be bit-identical.",
    ),
]


@grouped
def verify(
    path: cli.PathArgument, *, against: AgainstOption = None, as_json: cli.JsonOption = False, hub: cli.Hub
) -> None:
    """Check a checkpoint: index, names, shapes, finite values, strict loading, generation."""
    sink = Output(as_json=as_json)
    if not path.is_dir():
        raise SourceError(f"there is no folder {path}.", hint="pass the folder that 'hcsmoe convert' wrote")
    prepare_libraries()
    with sink.working("Checking"):
        from hcsmoe_hub.hub.open import open_source
        from hcsmoe_hub.result.verify import verify as check

        source = None if against is None else open_source(against, **hub.arguments())
        found = check(path, against=source)
    document = {"ok": True, "path": str(path), "against": against, **asdict(found)}
    sink.result(document, human=_summary(document, check_mark=sink.check_mark))
    for message in found.warnings:
        sink.warn(message)


def _summary(document: Document, *, check_mark: str) -> RenderableType:
    """What was checked."""
    layers = format_plural(document["moe_layers"], "MoE layer")
    tensors, size = format_plural(document["tensors"], "tensor"), format_bytes(document["weights_bytes"])
    rows = [
        ("structure", f"index, headers, names, shapes and config agree: {layers} x {document['experts']} experts"),
        ("values", f"{tensors}, {size}, every value finite"),
        ("reload", "from_pretrained in a fresh process: no tensor missing, unexpected or mismatched"),
        ("generation", f"{len(document['generated'])} tokens from finite logits"),
    ]
    if document["against"] is not None:
        rows.append(
            ("source", f"{document['identical']} tensors outside the merge are bit-identical to {document['against']}")
        )
    return Group(
        Text.assemble(
            (check_mark, "bold green"), (f" {document['path']} is sound", "bold"), no_wrap=True, overflow="ignore"
        ),
        section(rows, indent=2),
    )
