"""``hcsmoe recover``: trains a result on the logits of its source, or shows what would be trained."""

import shlex
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hcsmoe_hub.cli.groups import grouped
from hcsmoe_hub.cli.libraries import collector_paused, prepare_libraries
from hcsmoe_hub.cli.output import Output
from hcsmoe_hub.cli.progress import listening
from hcsmoe_hub.cli.recover_options import (
    DataOption,
    EndFlags,
    RecoveryComputeFlags,
    RecoveryOutputFlags,
    RecoveryTextFlags,
    ResultArgument,
    TeacherOption,
    TrainingFlags,
)
from hcsmoe_hub.cli.recover_summary import dry_run, recovery
from hcsmoe_hub.recover import recover as train
from hcsmoe_hub.recovery.options import RecoverOptions

if TYPE_CHECKING:
    from hcsmoe_hub.recover import RecoveryReport

RECOVER_EXAMPLES = """Examples:
$ hcsmoe recover ./mixtral-4e --teacher mistralai/Mixtral-8x7B-v0.1 --data chats.jsonl --dry-run
$ hcsmoe recover ./mixtral-4e --teacher ./mixtral --data chats.jsonl --max-minutes 60
$ hcsmoe recover ./mixtral-4e --teacher ./mixtral --data c4 --train lora --teacher-logits ./logits
$ accelerate launch --num_processes 8 -m hcsmoe_hub.cli recover ./mixtral-4e --teacher ./mixtral --data c4"""

TokenOption = Annotated[
    str | None,
    typer.Option(
        "--token",
        metavar="TOKEN",
        envvar="HF_TOKEN",
        rich_help_panel="Hub",
        show_default="the stored login",
        help="Hub access token.",
    ),
]


@grouped
def recover(
    result: ResultArgument,
    *,
    teacher: TeacherOption,
    data: DataOption,
    text: RecoveryTextFlags,
    training: TrainingFlags,
    end: EndFlags,
    compute: RecoveryComputeFlags,
    output: RecoveryOutputFlags,
    token: TokenOption = None,
) -> None:
    """Train a result on the logits of its source, and write the weights that do best.

    The weights with the best score on held-out text are written, even if they are the untrained ones.
    The same command goes on with an interrupted recovery.
    """
    options = RecoverOptions(
        teacher=teacher,
        data=data,
        **asdict(text),
        **_given(training),
        **_given(end, patience=end.patience or None),
        **asdict(compute),
        output=output.output,
        overwrite=output.overwrite,
        restart=output.restart,
    )
    sink = Output(as_json=output.as_json, quiet=output.quiet)
    with collector_paused():
        prepare_libraries()
    if output.dry_run:
        _preview(result, options, token, sink)
        return
    start = time.perf_counter()
    with listening(sink) as listener:
        report = train(result, options, token=token, listener=listener)
    document = _document(report)
    human = recovery(document, check_mark=sink.check_mark, seconds=time.perf_counter() - start)
    sink.result(document, human=human, brief=document["output"])
    sink.hint(f"check it with 'hcsmoe verify {shlex.quote(document['output'])}'")


def _given(flags: Any, **others: Any) -> dict[str, Any]:
    """The fields of a group of options, but for those whose default is the library's own."""
    values = asdict(flags) | others
    if values.get("train", ()) is None:
        del values["train"]
    return values


def _document(report: "RecoveryReport") -> dict[str, Any]:
    return {
        "output": str(report.output),
        "is_better": report.is_better,
        "recovery": report.record,
        "warnings": report.warnings,
    }


def _preview(result: str, options: RecoverOptions, token: str | None, sink: Output) -> None:
    with sink.working("Reading headers"):
        from hcsmoe_hub.recovery.preview import preview

        found = preview(result, options, token=token)
    document: Mapping[str, Any] = {
        **asdict(found),
        "memory": {**asdict(found.memory), "total": found.memory.total},
        "max_minutes": options.max_minutes,
        "output": str(found.output),
        "teacher_logits": None if options.teacher_logits is None else str(options.teacher_logits),
    }
    sink.result(document, human=dry_run(document), brief=document["output"])
    for message in document["warnings"]:
        sink.warn(message)
    sink.hint("drop --dry-run to train")
