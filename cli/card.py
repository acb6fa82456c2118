"""``hcsmoe card``: writes the model card of a result, and rewrites it after an evaluation."""

from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from hcsmoe_hub.cli import options as cli
from hcsmoe_hub.cli.groups import grouped
from hcsmoe_hub.cli.libraries import collector_paused, prepare_libraries
from hcsmoe_hub.cli.output import Output
from hcsmoe_hub.cli.tables import Document, section
from hcsmoe_hub.errors import SourceError
from hcsmoe_hub.machine.units import format_plural

OverwriteOption = Annotated[
    bool,
    typer.Option("--overwrite", metavar="", help="Replace a README.md that hcsmoe did not write, or that was edited."),
]
RepoIdOption = Annotated[
    str | None,
    typer.Option(
        "--repo-id",
        metavar="REPO_ID",
        show_default="that of the existing card",
        help="Repository that the commands in the card load from, e.g. me/model-4e.",
    ),
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", metavar="", help="Print only the path of the card.")]


@grouped
def card(
    path: cli.PathArgument,
    *,
    repo_id: RepoIdOption = None,
    overwrite: OverwriteOption = False,
    as_json: cli.JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write README.md from hcsmoe.json and the evaluation; keeps marked sections."""
    sink = Output(as_json=as_json, quiet=quiet)
    if not path.is_dir():
        raise SourceError(f"there is no folder {path}.", hint="pass the folder that 'hcsmoe convert' wrote")
    with collector_paused():
        prepare_libraries()
        from hcsmoe_hub.model_cards import HELD_OUT_TEXT, write_card
    written = write_card(path, repo_id, overwrite=overwrite)
    for message in written.warnings:
        sink.warn(message)
    document: Document = {
        "path": str(written.path),
        "repo_id": written.repo_id,
        "measures": written.measures,
        "kept_sections": written.kept_sections,
        "warnings": written.warnings,
    }
    sink.result(document, human=_summary(document, check_mark=sink.check_mark), brief=str(written.path))
    # What the conversion itself measured says nothing of text of another kind.
    if set(written.measures) <= {HELD_OUT_TEXT}:
        sink.hint("measure it with 'hcsmoe evaluate' on text of your own, then write the card again")


def _summary(document: Document, *, check_mark: str) -> RenderableType:
    rows = [("quality", ", ".join(document["measures"]) or "not measured")]
    if document["repo_id"] is not None:
        rows.append(("repository", document["repo_id"]))
    if document["kept_sections"]:
        rows.append(("kept", format_plural(document["kept_sections"], "section")))
    title = Text.assemble((check_mark, "bold green"), (f" Wrote {document['path']}", "bold"))
    title.no_wrap, title.overflow = True, "ignore"
    return Group(title, section(rows, indent=2))
