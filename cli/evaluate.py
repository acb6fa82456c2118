"""``hcsmoe evaluate``: measures a checkpoint, alone or next to the one that it was made from."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hcsmoe_hub.cli import options as cli
from hcsmoe_hub.cli.groups import grouped
from hcsmoe_hub.cli.libraries import collector_paused, prepare_libraries
from hcsmoe_hub.cli.output import Output
from hcsmoe_hub.cli.progress import listening
from hcsmoe_hub.cli.tables import Document
from hcsmoe_hub.cli.values import parse_device
from hcsmoe_hub.evaluation.options import DEFAULT_WINDOW, EvaluateOptions
from hcsmoe_hub.options import Device
from hcsmoe_hub.report import EVALUATION_FILE

NOTHING = "-"
OVERALL = "overall"
Row = Mapping[str, Any]

BaseOption = Annotated[
    str | None,
    typer.Option(
        "--base", metavar="SOURCE", show_default=False, help="Checkpoint that it was made from, to compare with."
    ),
]
PerplexityOption = Annotated[
    Path | None,
    typer.Option(
        "--perplexity",
        metavar="FILE",
        show_default=False,
        help='Text file, one {"text", "domain"} per line; domain is optional.',
    ),
]
ChoicesOption = Annotated[
    Path | None,
    typer.Option(
        "--choices",
        metavar="FILE",
        show_default=False,
        help='Multiple-choice questions, one {"context", "choices", "gold", "domain"} per line; domain is optional.',
    ),
]
TasksOption = Annotated[
    str | None,
    typer.Option(
        "--tasks",
        metavar="NAMES",
        show_default=False,
        help="Tasks of lm-eval, e.g. hc-smoe (the eight of the HC-SMoE paper) or arc_easy,my-task.yaml; needs "
        "hcsmoe[eval].",
    ),
]
GenerateOption = Annotated[
    int,
    typer.Option(
        "--generate", min=0, metavar="N", help="Prompts of the text to continue, to count those that end in a loop."
    ),
]
WindowOption = Annotated[int, typer.Option("--window", min=1, metavar="N", help="Tokens per window of text.")]
StreamOption = Annotated[
    bool,
    typer.Option("--stream", metavar="", help="Keep one decoder layer in memory at a time, even if the model fits."),
]
DeviceOption = Annotated[
    str,
    typer.Option("--device", parser=parse_device, metavar="NAME", help=f"Where the model runs: {cli.DEVICES}."),
]
ResultOption = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        show_default=f"PATH/{EVALUATION_FILE}",
        help="File to add the results to.",
    ),
]


@grouped
def evaluate(
    path: cli.SourceArgument,
    *,
    base: BaseOption = None,
    perplexity: PerplexityOption = None,
    choices: ChoicesOption = None,
    tasks: TasksOption = None,
    generate: GenerateOption = 0,
    window: WindowOption = DEFAULT_WINDOW,
    stream: StreamOption = False,
    device: DeviceOption = Device.AUTO,
    output: ResultOption = None,
    as_json: cli.JsonOption = False,
    hub: cli.Hub,
) -> None:
    """Measure perplexity, multiple choice, agreement with the source, loops and lm-eval tasks."""
    options = EvaluateOptions(
        base=base,
        perplexity=perplexity,
        choices=choices,
        tasks=tuple(filter(None, (word.strip() for word in (tasks or "").split(",")))),
        generate=generate,
        window=window,
        device=device,
        stream=stream,
        output=output,
    )
    options.check()
    sink = Output(as_json=as_json)
    with collector_paused():
        prepare_libraries()
        from hcsmoe_hub.evaluation.evaluate import evaluate as measure
    with listening(sink) as listener:
        document, file = measure(path, options, listener=listener, **hub.arguments())
    sink.result(document, human=_figures(document))
    sink.hint(f"the results are kept in {file}")


def _figures(document: Document) -> RenderableType:
    """One table per measure in the file."""
    measures = document["measures"]
    tables: Mapping[str, Callable[[Document], Table]] = {
        "perplexity": _perplexity,
        "agreement": _agreement,
        "choices": _choices,
        "loops": _loops,
        "tasks": _tasks,
    }
    blocks: list[RenderableType] = []
    for name, table in tables.items():
        if name in measures:
            blocks += [Text()] if blocks else []
            blocks += [Text(_title(name, measures[name]), style="bold"), table(measures[name])]
    return Group(*blocks)


def _title(name: str, measure: Document) -> str:
    if "file" not in measure:
        return f"{name} (lm-eval {measure['versions']['lm_eval']})"
    file = measure["file"]
    return f"{name} ({file['name']}, {file['tokens']} tokens)"


def _table(titles: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, title in enumerate(titles):
        table.add_column(title, justify="right" if number else "left", no_wrap=True)
    return table


def _rows(measure: Document) -> Iterator[tuple[str, Row, Row | None]]:
    """Domain, figures of the model, and figures of its base: the domains first, then everything."""
    model, base = measure["model"], measure.get("base")
    for domain, row in model["domains"].items():
        yield domain, row, base["domains"][domain] if base else None
    yield OVERALL, model["overall"], base["overall"] if base else None


def _share(row: Row | None, name: str) -> str:
    """A percentage with its standard error, if there is one."""
    if row is None:
        return NOTHING
    error = row.get(f"{name}_stderr")
    return f"{100 * row[name]:.1f} %" if error is None else f"{100 * row[name]:.1f} ± {100 * error:.1f} %"


def _perplexity(measure: Document) -> Table:
    table = _table(("DOMAIN", "MODEL", "BASE", "RATIO"))
    for domain, row, base in _rows(measure):
        ratio = NOTHING if base is None else f"{row['perplexity'] / base['perplexity']:.4f}"
        theirs = NOTHING if base is None else f"{base['perplexity']:.3f}"
        table.add_row(domain, f"{row['perplexity']:.3f}", theirs, ratio)
    return table


def _agreement(measure: Document) -> Table:
    table = _table(("DOMAIN", "TOP-1 AGREEMENT", "KL, NATS"))
    for domain, row, _ in _rows(measure):
        table.add_row(domain, _share(row, "top1_agreement"), f"{row['kl']:.4f}")
    return table


def _choices(measure: Document) -> Table:
    table = _table(("DOMAIN", "MODEL", "BASE", "PLAIN MODEL", "PLAIN BASE"))
    for domain, row, base in _rows(measure):
        shares = [_share(one, name) for name in ("accuracy", "plain_accuracy") for one in (row, base)]
        table.add_row(domain, *shares)
    return table


def _loops(measure: Document) -> Table:
    table = _table(("DOMAIN", "LOOPS OF MODEL", "LOOPS OF BASE", "REPEATED 4-GRAMS", "OF BASE"))
    for domain, row, base in _rows(measure):
        shares = [_share(one, name) for name in ("loop_rate", "repeated_4grams") for one in (row, base)]
        table.add_row(domain, *shares)
    return table


def _tasks(measure: Document) -> Table:
    table = _table(("TASK", "METRIC", "MODEL", "BASE"))
    model, base = measure["model"], measure.get("base")
    for task, row in model["tasks"].items():
        for metric in (name for name in row if not name.endswith("_stderr")):
            theirs = base["tasks"][task] if base else None
            table.add_row(task, metric, _metric(row, metric), _metric(theirs, metric))
    if model["average"] is not None:
        theirs = NOTHING if base is None else f"{base['average']:.4f}"
        table.add_row("average", "acc", f"{model['average']:.4f}", theirs)
    return table


def _metric(row: Row | None, name: str) -> str:
    if row is None:
        return NOTHING
    error = row.get(f"{name}_stderr")
    return f"{row[name]:.4f}" if error is None else f"{row[name]:.4f} ± {error:.4f}"
