"""Size against quality of one source: plan the points, calibrate, run once, measure.

Importing this module is cheap; torch and transformers are imported when work begins.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hcsmoe_hub.errors import OutputError
from hcsmoe_hub.events import EventLog, Listener, Stage, StageAdvanced, Warned, ignore
from hcsmoe_hub.options import CurveOptions
from hcsmoe_hub.report.curve import CurveReport

if TYPE_CHECKING:
    from hcsmoe_hub.checkpoint.source import Source
    from hcsmoe_hub.planning.curve_plan import CurvePlan

NOT_FINITE = "the predictions of the source or of a point are not finite numbers; its perplexity was not measured."


def curve(
    source: "str | Path | Source",
    options: CurveOptions,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: Path | None = None,
    listener: Listener = ignore,
) -> CurveReport:
    """Compares several sizes of a checkpoint, from one pass over it; writes no weights.

    Every point is what ``convert`` makes with ``refit="none", propagate="original"``: a refit brings the ratio down
    further.

    Args:
        source: Local folder, Hub repository id, or an opened source.
        options: Which sizes to compare.
        revision: Branch, tag or commit of a repository.
        token: Hub token; ``None`` uses the stored login.
        cache_dir: Hub cache; ``None`` uses the default one.
        listener: Called with every event.

    Raises:
        HcsmoeError: If the model cannot have one of the sizes, there is no text to measure on, or a download, the disk
            or memory fails.
    """
    from hcsmoe_hub.checkpoint.source import Source
    from hcsmoe_hub.hub.open import open_source
    from hcsmoe_hub.planning.curve_plan import plan_curve
    from hcsmoe_hub.planning.room import device_room
    from hcsmoe_hub.result.curve_figure import draw_curve

    log = EventLog(listener)
    _check_figure(options.figure)
    with log.timed(Stage.PLAN, 1):
        room = device_room(options.device, options.max_memory)
        if not isinstance(source, Source):
            source = open_source(str(source), revision=revision, token=token, cache_dir=cache_dir)
        plan = plan_curve(source, options, device_room=room)
    for message in plan.warnings:
        log.emit(Warned(message))
    report = _measure(plan, log)
    if options.figure is not None:
        draw_curve(report, options.figure, title=plan.model.source.name)
    return report


def _measure(plan: "CurvePlan", log: EventLog) -> CurveReport:
    """Runs the source and its points, and reports what they cost."""
    from hcsmoe_hub.machine.device import measuring_memory, resolve_device
    from hcsmoe_hub.machine.out_of_memory import explaining
    from hcsmoe_hub.pipeline.curve import measure_curve
    from hcsmoe_hub.pipeline.curve_report import make_curve_report
    from hcsmoe_hub.pipeline.held_out import measure_results
    from hcsmoe_hub.pipeline.run import load_tokens
    from hcsmoe_hub.planning.memory import savings

    device = resolve_device(plan.points[0].options.device)

    def helps() -> list[str]:
        return ["fewer points", *savings(plan.points[0])]

    with measuring_memory(device), explaining(device, where=lambda: log.place, helps=helps):
        with log.timed(Stage.CALIBRATION, 1):
            calibration = load_tokens(plan.points[0], log.emit)
        plan = replace(plan, points=[point.split_as(calibration) for point in plan.points])
        with log.timed(Stage.OBSERVE, len(plan.model.skeleton.layers)):
            found = measure_curve(plan, calibration, log.emit)
        with log.timed(Stage.MEASURE, len(found.held_out.domains)):
            hidden, advance = list(found.results_MSH.values()), partial(log.emit, StageAdvanced(Stage.MEASURE))
            figures = measure_results(found.held_out, hidden, advance)
    if None in figures:
        log.emit(Warned(NOT_FINITE))
    measured = dict(zip(found.results_MSH, figures, strict=True))
    return make_curve_report(plan, calibration, found.points, measured, warnings=log.warnings, seconds=log.seconds)


def _check_figure(path: Path | None) -> None:
    """Checks that a figure can be written, before the model runs for it."""
    if path is None:
        return
    if path.is_dir():
        raise OutputError(f"{path} is a folder.", hint="name a file for `figure`")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"the folder of {path} does not exist.", hint="choose another file with `figure`")
