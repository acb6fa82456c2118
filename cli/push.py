"""``hcsmoe push``: publishes a result on the Hub in one commit."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn
from rich.text import Text

from hcsmoe_hub.checkpoint.auto_class import loading
from hcsmoe_hub.cli import options as cli
from hcsmoe_hub.cli.groups import grouped
from hcsmoe_hub.cli.libraries import collector_paused, prepare_libraries
from hcsmoe_hub.cli.output import REFRESHES_PER_SECOND, Mode, Output
from hcsmoe_hub.cli.progress import BAR_WIDTH, listening
from hcsmoe_hub.cli.tables import Document, section
from hcsmoe_hub.events import Delivered, Event, Listener, Sending, Warned, ignore
from hcsmoe_hub.machine.units import format_bytes, format_plural
from hcsmoe_hub.options import PushOptions
from hcsmoe_hub.push import push as publish

_hub = partial(typer.Option, rich_help_panel="Hub")
_output = partial(typer.Option, rich_help_panel="Output")

RepoArgument = Annotated[
    str, typer.Argument(metavar="REPO_ID", show_default=False, help="Repository on the Hub: NAMESPACE/NAME.")
]
OverwriteOption = Annotated[bool, _hub("--overwrite", metavar="", help="Replace an existing checkpoint.")]
BranchOption = Annotated[
    str | None,
    _hub("--revision", metavar="BRANCH", show_default="main", help="Branch to push to; created if it does not exist."),
]
TokenOption = Annotated[
    str | None,
    _hub("--token", metavar="TOKEN", envvar="HF_TOKEN", show_default="the stored login", help="Hub access token."),
]
QuietOption = Annotated[bool, _output("--quiet", "-q", metavar="", help="Print only the URL of the commit.")]


@grouped
def push(
    path: cli.PathArgument,
    repo_id: RepoArgument,
    *,
    private: cli.PrivateOption = False,
    create_pr: cli.CreatePrOption = False,
    overwrite: OverwriteOption = False,
    revision: BranchOption = None,
    token: TokenOption = None,
    as_json: cli.JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Publish a result on the Hub in one commit, once every file has been sent."""
    options = PushOptions(repo_id=repo_id, private=private, create_pr=create_pr, overwrite=overwrite, revision=revision)
    sink = Output(as_json=as_json, quiet=quiet)
    with collector_paused():
        prepare_libraries()
    with watching(sink) as listener:
        document = publish(path, options, token=token, listener=listener).as_dict()
    sink.result(document, human=_summary(document, check_mark=sink.check_mark), brief=document["url"])
    if document["pull_request"] is None:
        # Imported on use: it takes a second, and the push has needed it.
        from hcsmoe_hub.checkpoint.source import LocalSource

        config = LocalSource(path).config
        expression = loading(repo_id, config["model_type"], revision=revision, runs_code="auto_map" in config)
        sink.hint(f"load it with {expression}")


@contextmanager
def watching(sink: Output) -> Iterator[Listener]:
    """Yields a listener that shows a push in the mode of ``sink``."""
    if sink.mode is Mode.QUIET:
        yield ignore
    elif sink.is_live:
        view = _Bars(sink)
        with view.progress:
            yield view.listen
    else:
        with listening(sink) as listener:
            yield listener


class _Bars:
    """A live line per large file: bytes, speed and time."""

    def __init__(self, sink: Output) -> None:
        self._sink = sink
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(BAR_WIDTH),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeElapsedColumn(),
            console=sink.stderr,
            refresh_per_second=REFRESHES_PER_SECOND,
        )

    def listen(self, event: Event) -> None:
        if isinstance(event, Sending):
            # Bytes that are sent again after a failure count once.
            self._show(event.file, event.file_bytes, min(event.bytes_sent, event.file_bytes))
        elif isinstance(event, Delivered):
            self._show(event.file, event.file_bytes, event.file_bytes)
        elif isinstance(event, Warned):
            self._sink.warn(event.message)

    def _show(self, file: str, total: int, completed: int) -> None:
        known = {task.description: task.id for task in self.progress.tasks}
        task = known[file] if file in known else self.progress.add_task(file, total=total)
        self.progress.update(task, completed=completed)


def _summary(document: Document, *, check_mark: str) -> RenderableType:
    """What was pushed, and where it is."""
    where = document["repo_id"]
    if document["pull_request"] is not None:
        title = f" {where} has a pull request"
    elif document["changed"]:
        title = f" {where} is on the Hub"
    else:
        title = f" {where} was on the Hub already"
    sent = document["bytes_sent"]
    sizes = format_bytes(document["bytes"]) + ("" if sent is None else f", {format_bytes(sent)} sent")
    visibility = "private" if document["private"] else "public"
    rows = [("commit", document["url"])]
    if document["pull_request"] is not None:
        rows.append(("pull request", document["pull_request"]))
    rows += [("repository", f"{visibility}, {document['revision']}")]
    rows += [("files", f"{format_plural(len(document['files']), 'file')}, {sizes}")]
    if document["deleted"]:
        rows.append(("replaced", f"deleted {', '.join(document['deleted'])}"))
    if document["left_out"]:
        rows.append(("left out", f"{', '.join(document['left_out'])}: not part of the checkpoint"))
    return Group(
        Text.assemble((check_mark, "bold green"), (title, "bold"), no_wrap=True, overflow="ignore"),
        section(rows, indent=2),
    )
