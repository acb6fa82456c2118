"""``hcsmoe evaluate``: measures a checkpoint, alone or next to the one that it was made from."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hcsmoe_hub.cli import options as cli
from hcsmoe_hub.cli.flags import flag
from hcsmoe_hub.cli.groups import grouped
from hcsmoe_hub.cli.help_page import one_of
from hcsmoe_hub.cli.libraries import collector_paused, prepare_libraries
from hcsmoe_hub.cli.output import Output
from hcsmoe_hub.cli.progress import listening
from hcsmoe_hub.cli.tables import Document
from hcsmoe_hub.cli.values import choice, parse_batch_sizes, parse_device
from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.evaluation.cost_options import CostOptions, Engine
from hcsmoe_hub.evaluation.cost_rows import cost_notes, cost_rows
from hcsmoe_hub.evaluation.options import DEFAULT_WINDOW, EvaluateOptions
from hcsmoe_hub.options import Device
from hcsmoe_hub.report import EVALUATION_FILE

NOTHING = "-"
OVERALL = "overall"
Row = Mapping[str, Any]

BaseOption = Annotated[
    str | None,
    typer.Option(
        "--base", metavar="SOURCE", show_default=False, help="Checkpoint that the model was made from, to compare with."
    ),
]
PerplexityOption = Annotated[
    Path | None,
    typer.Option(
        "--perplexity",
        metavar="FILE",
        show_default=False,
        help='Text file, one {"text", "domain"} per line; for a model with an encoder {"source", "target", "domain"}, '
        "or text to cut spans out of. domain is optional.",
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
LimitOption = Annotated[
    int | None,
    typer.Option(
        "--limit",
        min=1,
        metavar="N",
        show_default=False,
        help="Only the first N questions of every task, for a trial.",
    ),
]
GenerateOption = Annotated[
    int,
    typer.Option(
        "--generate",
        min=0,
        metavar="N",
        help="Prompts (or sources) of the --perplexity file to continue, to count those that end in a loop.",
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

_COST = CostOptions()
_cost = partial(typer.Option, rich_help_panel="Cost")


@dataclass(frozen=True, slots=True, kw_only=True)
class CostFlags:
    """Whether and how the cost of running the model is counted and measured."""

    cost: Annotated[
        bool,
        _cost("--cost", metavar="", help="Count FLOPs, and measure memory and throughput."),
    ] = False
    engine: Annotated[
        Engine,
        _cost("--engine", parser=choice(Engine), metavar="NAME", help=f"What runs the model: {one_of(Engine)}."),
    ] = _COST.engine
    prompt_tokens: Annotated[
        int | None,
        _cost(
            "--prompt-tokens",
            min=1,
            metavar="N",
            show_default=f"{_COST.prompt_length}, or what the models accept",
            help="Tokens per prompt; FLOPs are counted at this length.",
        ),
    ] = None
    new_tokens: Annotated[
        int, _cost("--new-tokens", min=1, metavar="N", help="Tokens to generate after each prompt.")
    ] = _COST.new_tokens
    repetitions: Annotated[
        int, _cost("--repetitions", min=1, metavar="N", help="Runs to measure, after one to warm up.")
    ] = _COST.repetitions
    batch_sizes: Annotated[
        tuple[int, ...] | None,
        _cost(
            "--batch-sizes",
            parser=parse_batch_sizes,
            metavar="N,N,...",
            show_default=",".join(map(str, _COST.batch_sizes)),
            help="Prompts that run at once.",
        ),
    ] = None
    no_timing: Annotated[bool, _cost("--no-timing", metavar="", help="Count only; loads no weights.")] = False

    def options(self) -> CostOptions | None:
        """The options of the library; ``None`` without ``--cost``.

        Raises:
            PlanError: If there are others of them, but not ``--cost`` itself.
        """
        if not self.cost:
            for name, value in asdict(CostFlags()).items():
                if getattr(self, name) != value:
                    raise PlanError(
                        f"{flag(name)} was given, but cost is not to be measured.",
                        hint="add `cost`, or drop the option",
                        option=name,
                    )
            return None
        return CostOptions(
            engine=self.engine,
            prompt_tokens=self.prompt_tokens,
            new_tokens=self.new_tokens,
            repetitions=self.repetitions,
            batch_sizes=self.batch_sizes or _COST.batch_sizes,
            timing=not self.no_timing,
        )


@grouped
def evaluate(
    path: cli.SourceArgument,
    *,
    base: BaseOption = None,
    perplexity: PerplexityOption = None,
    choices: ChoicesOption = None,
    tasks: TasksOption = None,
    limit: LimitOption = None,
    generate: GenerateOption = 0,
    window: WindowOption = DEFAULT_WINDOW,
    stream: StreamOption = False,
    device: DeviceOption = Device.AUTO,
    output: ResultOption = None,
    as_json: cli.JsonOption = False,
    cost: CostFlags,
    hub: cli.Hub,
) -> None:
    """Measure perplexity, choices, agreement with the source, loops, tasks and cost."""
    options = EvaluateOptions(
        base=base,
        perplexity=perplexity,
        choices=choices,
        tasks=tuple(filter(None, (word.strip() for word in (tasks or "").split(",")))),
        limit=limit,
        generate=generate,
        window=window,
        cost=cost.options(),
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
        "cost": _cost_table,
    }
    blocks: list[RenderableType] = []
    for name, table in tables.items():
        if name in measures:
            blocks += [Text()] if blocks else []
            blocks += [Text(_title(name, measures[name]), style="bold"), table(measures[name])]
    blocks += [Text(note) for note in cost_notes(measures["cost"])] if "cost" in measures else []
    return Group(*blocks)


def _title(name: str, measure: Document) -> str:
    if name == "cost":
        return name
    if "file" not in measure:
        limit = measure["settings"].get("limit")
        shortened = "" if limit is None else f", first {limit} questions of each"
        return f"{name} (lm-eval {measure['versions']['lm_eval']}{shortened})"
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


def _cost_table(measure: Document) -> Table:
    found: Any = measure
    table = _table(("COST", "BASE", "MODEL", "RATIO"))
    for row in cost_rows(found):
        table.add_row(*row)
    return table


def _metric(row: Row | None, name: str) -> str:
    if row is None:
        return NOTHING
    error = row.get(f"{name}_stderr")
    return f"{row[name]:.4f}" if error is None else f"{row[name]:.4f} ± {error:.4f}"
