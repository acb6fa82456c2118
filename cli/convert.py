"""``hcsmoe convert``: plan, and unless it is a dry run, carry out the plan."""

import shlex
import time
from typing import TYPE_CHECKING, Any

from hcsmoe_hub.checkpoint.auto_class import loading
from hcsmoe_hub.cli import options as cli
from hcsmoe_hub.cli import summary
from hcsmoe_hub.cli.documents import available, is_short_of_room, long_time, plan_document
from hcsmoe_hub.cli.groups import grouped
from hcsmoe_hub.cli.libraries import collector_paused, prepare_libraries
from hcsmoe_hub.cli.method_options import (
    ExpertsOption,
    ExpertsPerTokenOption,
    ExpertWidthOption,
    LikeOption,
    MethodFlags,
)
from hcsmoe_hub.cli.output import Output
from hcsmoe_hub.cli.progress import listening
from hcsmoe_hub.cli.target_options import TargetFlags
from hcsmoe_hub.convert import execute, plan
from hcsmoe_hub.events import Stage, StageFinished, StageStarted, Warned
from hcsmoe_hub.options import ConvertOptions, Layout
from hcsmoe_hub.report import FIGURE_FILE, SINGULAR_VALUES_FILE, ConversionReport

if TYPE_CHECKING:
    from hcsmoe_hub.planning.conversion_plan import ConversionPlan

EXAMPLES = """Examples:
$ hcsmoe convert mistralai/Mixtral-8x7B-v0.1 --experts 4 --dry-run
$ hcsmoe convert Qwen/Qwen3-30B-A3B --experts 96 --expert-width 75% --output qwen3-small
$ hcsmoe convert ./my-mixtral -e 6 --calibration domain.jsonl --samples 64
$ hcsmoe convert ./my-mixtral -e 6 --method prune --statistics my-mixtral.stats
$ hcsmoe convert mistralai/Mixtral-8x7B-v0.1 -e 4 --push-to me/mixtral-4e --low-disk"""


@grouped
def convert(
    source: cli.SourceArgument,
    *,
    experts: ExpertsOption = None,
    expert_width: ExpertWidthOption = None,
    experts_per_token: ExpertsPerTokenOption = None,
    like: LikeOption = None,
    target: TargetFlags,
    method: MethodFlags,
    calibration: cli.CalibrationFlags,
    compute: cli.ComputeFlags,
    output: cli.OutputFlags,
    pushing: cli.PushFlags,
    hub: cli.Hub,
) -> None:
    """Merge or prune experts and write a checkpoint with fewer of them."""
    options = ConvertOptions(
        experts=experts,
        expert_width=expert_width,
        target=target.target(),
        experts_per_token=experts_per_token,
        method=method.options(seed=calibration.seed),
        like=like,
        calibration=calibration.options(),
        dtype=output.dtype,
        mtp=output.mtp,
        output=output.output,
        max_shard_size=output.max_shard_size,
        overwrite=output.overwrite,
        restart=output.restart,
        checkpoint=not output.no_checkpoint,
        device=compute.device,
        batch_tokens=compute.batch_tokens,
        max_memory=compute.limits(),
        statistics=calibration.statistics,
        keep_states=not calibration.no_states,
        measure=not calibration.no_measure,
        figure=output.figure,
        push=pushing.options(overwrite=output.overwrite),
        low_disk=pushing.low_disk,
    )
    sink = Output(as_json=output.as_json, quiet=output.quiet)
    with collector_paused():
        prepare_libraries()
    run = _dry_run if output.dry_run else _convert
    run(source, options, hub, sink)


def _convert(source: str, options: ConvertOptions, hub: cli.Hub, sink: Output) -> None:
    start = time.perf_counter()
    with listening(sink) as listener:
        listener(StageStarted(Stage.PLAN, 1))
        with collector_paused():
            planned = plan(source, options, **hub.arguments())
            slow = long_time(planned)
        listener(StageFinished(Stage.PLAN, time.perf_counter() - start))
        if slow is not None:
            listener(Warned(slow))
        report = execute(planned, token=hub.token, listener=listener)
    document = _document(planned, report)
    human = summary.conversion(document, check_mark=sink.check_mark, seconds=time.perf_counter() - start)
    sink.result(document, human=human, brief=document["output"] or document["pushed"]["url"])
    if planned.sends_away:
        runs_code = report.method["layout"] in (Layout.MAPPED, Layout.FACTORED)
        place, kind = document["pushed"]["repo_id"], report.source["model_type"]
        sink.hint(f"load it with {loading(place, kind, runs_code=runs_code)}")
        return
    path = shlex.quote(str(planned.output))
    sink.hint(f"check it with 'hcsmoe verify {path}', look at its clusters with 'hcsmoe inspect {path}'")


def _document(plan: "ConversionPlan", report: ConversionReport) -> dict[str, Any]:
    """The report, and where the result is: ``output`` is ``None`` if it is on the Hub alone."""
    document = {**report.as_dict(), "output": None if plan.sends_away else str(plan.output)}
    for name, file in (("figure", FIGURE_FILE), ("singular_values", SINGULAR_VALUES_FILE)):
        if (plan.output / file).exists():
            document[name] = str(plan.output / file)
    if report.pushed is not None:
        document["pushed"] = report.pushed.as_dict()
    return document


def _dry_run(source: str, options: ConvertOptions, hub: cli.Hub, sink: Output) -> None:
    with sink.working("Reading headers"):
        planned = plan(source, options, **hub.arguments())
        room = available(planned)
        document = plan_document(planned) | {"available": room}
        human = summary.dry_run(document, room)
        would_start = not is_short_of_room(planned)
    sink.result(document, human=human, brief=str(planned.output))
    for message in document["warnings"]:
        sink.warn(message)
    if would_start:
        sink.hint("drop --dry-run to convert")
