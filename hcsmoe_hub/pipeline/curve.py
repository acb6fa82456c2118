"""One pass over the source that measures several sizes of it: every layer is reduced, run and forgotten.

P points, M held-out sequences of S tokens, H hidden size.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, TypeAlias

import torch
from torch import Tensor

from hcsmoe_hub.calibration.calibration_set import CalibrationSet
from hcsmoe_hub.checkpoint.formats import LogicalTensor
from hcsmoe_hub.errors import CalibrationError
from hcsmoe_hub.events import Listener, Stage, StageAdvanced
from hcsmoe_hub.layer.context import LayerContext
from hcsmoe_hub.layer.deviation import Deviation, compare_reduced
from hcsmoe_hub.layer.point_reducer import PointReducer, SharedLayer
from hcsmoe_hub.layer.stored_experts import Rounded, StoredExperts
from hcsmoe_hub.machine.allocator import return_freed_memory
from hcsmoe_hub.methods.clustering import loss_table
from hcsmoe_hub.model.expert_kinds import use_probe
from hcsmoe_hub.model.layer_loader import free
from hcsmoe_hub.model.microbatch import MicroBatcher
from hcsmoe_hub.observation.observers import RoutedObserver
from hcsmoe_hub.observation.statistics import Call, LayerStatistics, pick_rows, pick_tokens, spaced
from hcsmoe_hub.observation.statistics_writer import open_statistics
from hcsmoe_hub.observation.watcher import Observation, remembering_calls
from hcsmoe_hub.pipeline.held_out import HeldOut, why_not_measured
from hcsmoe_hub.pipeline.observing_pass import ObservingPass, find_block
from hcsmoe_hub.pipeline.reading import batcher_for, open_loader, open_reader, stored_experts
from hcsmoe_hub.pipeline.reduced_layer import reduced_layer
from hcsmoe_hub.pipeline.rows import Rows
from hcsmoe_hub.pipeline.stream import StreamedLayer, Visitor, lengths, stream
from hcsmoe_hub.planning.conversion_plan import ConversionPlan
from hcsmoe_hub.planning.curve_plan import CurvePlan, is_source
from hcsmoe_hub.result.make_report import describe

# Held-out tokens that the outputs of a layer are compared on; more change the error little.
ERROR_TOKENS = 4096


class Original(Enum):
    """The sets of hidden states in the source."""

    CALIBRATION = "calibration sequences"
    HELD_OUT = "held-out sequences"


# A set of hidden states: one of the source's, or the held-out sequences in the model of one point.
Key: TypeAlias = Original | int


@dataclass(slots=True, kw_only=True, eq=False)
class PointWork:
    """What a point is computed with, and what was found about its layers.

    Attributes:
        plan: Its size.
        reducer: Reduces a block to it.
        lost: Predicted share of the output energy that every MoE layer loses, by decoder layer.
        deviations: How far every MoE layer alone is from that of the source on held-out tokens; empty for the source.
    """

    plan: ConversionPlan
    reducer: PointReducer
    lost: dict[int, float] = field(default_factory=dict)
    deviations: dict[int, Deviation] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MeasuredCurve:
    """What a pass found.

    Attributes:
        points: The points, in the order of the plan.
        held_out: The held-out sequences after their way through the source.
        results_MSH: The same after their way through every measured point, by its number.
    """

    points: list[PointWork]
    held_out: HeldOut
    results_MSH: Mapping[int, Tensor]


class CurvePass:
    """Observes every layer, reduces it to every point, and runs it for those that are measured.

    Args:
        points: The points.
        measured: Numbers of those that are measured.
        observer: Observes the source on the calibration sequences.
        stored: Rounds experts to the format of the source.
        batcher: Cuts the held-out sequences into micro-batches.
        rows: The sets of hidden states.
    """

    def __init__(
        self,
        points: Sequence[PointWork],
        measured: frozenset[int],
        observer: ObservingPass,
        *,
        stored: StoredExperts,
        batcher: MicroBatcher,
        rows: Rows[Key],
    ) -> None:
        for point in points:
            if point.plan.reduced is not None:
                use_probe(point.plan.reduced.module)
        self._points = points
        self._measured = measured
        self._observer = observer
        self._stored = stored
        self._batcher = batcher
        self._rows = rows
        # Points whose hidden states are not those of the source any more.
        self._apart: set[int] = set()

    def visit(self, layer: StreamedLayer, inputs: Call) -> Any:
        """All that happens to a decoder layer while it is in memory."""
        found = self._rows.split(inputs)
        plan = self._points[0].plan
        block = find_block(plan, layer.index, layer.batcher)
        outputs: dict[Key, Any] = {}
        if block is None:
            outputs[Original.CALIBRATION] = layer.run(found[Original.CALIBRATION])
            held_out = replace(layer, batcher=self._batcher)
            outputs[Original.HELD_OUT] = held_out.run(found[Original.HELD_OUT])
            outputs |= {number: held_out.run(found[number]) for number in sorted(self._apart)}
        else:
            outputs[Original.CALIBRATION], seen = self._observer.observe(layer, found[Original.CALIBRATION], block)
            if layer.index < plan.model.skeleton.depth:
                # What an MTP head costs is not measured: it predicts other tokens.
                context = LayerContext(source=block, result=None, shape=plan.shape, originals=layer.originals)
                outputs |= self._reduce(layer, found, context, seen)
            self._forget(layer.index)
        if Original.HELD_OUT in outputs:
            same = [number for number in sorted(self._measured) if number not in outputs]
            outputs |= dict.fromkeys(same, outputs[Original.HELD_OUT])
        return self._rows.join(outputs)

    def _reduce(
        self, layer: StreamedLayer, found: Mapping[Key, Call], context: LayerContext, seen: Observation
    ) -> dict[Key, Any]:
        """Runs a layer with experts in the source and at every point."""
        held_out = replace(layer, batcher=self._batcher)
        of_held_out = replace(context, source=replace(context.source, batcher=self._batcher))
        output, truth = _watched(held_out, of_held_out, found[Original.HELD_OUT], seen.statistics)
        outputs: dict[Key, Any] = {Original.HELD_OUT: output}
        shared = SharedLayer(context, seen)
        self._predict(layer.index, shared)
        for number, point in enumerate(self._points):
            if is_source(point.plan):
                continue
            sized = replace(context, result=point.plan.reduced, shape=point.plan.shape)
            reduced = point.reducer.reduce_shared(sized, shared)
            sized = replace(sized, source=of_held_out.source)
            point.deviations[layer.index] = compare_reduced(
                sized, reduced.changed, clusters=reduced.clusters, seen=truth
            )
            if number in self._measured:
                with reduced_layer(sized, reduced.changed, reduced.clusters.labels) as running:
                    outputs[number] = running.run(held_out, found[number])
                self._apart.add(number)
            del reduced
            return_freed_memory()
        free(context.source.experts.module)
        return outputs

    def _predict(self, layer: int, shared: SharedLayer) -> None:
        """Predicts what the layer loses at every point."""
        plans = [point.plan for point in self._points]
        experts, widths = sorted({plan.experts for plan in plans}), sorted({plan.width for plan in plans})
        table = loss_table(shared.energies, experts, widths)
        for point in self._points:
            point.lost[layer] = table.lost(point.plan.experts, point.plan.width)

    def _forget(self, layer: int) -> None:
        """Forgets the stored scales of a layer, which only a conversion would write."""
        self._stored.keep(layer, Rounded(tensors={}, parts={}))
        self._stored.take(layer)


def _watched(
    layer: StreamedLayer, context: LayerContext, inputs: Call, statistics: LayerStatistics
) -> tuple[Any, Observation]:
    """Runs a layer of the source on the held-out sequences.

    Returns:
        Its output; and inputs, choices and outputs of its block on some of the tokens.
    """
    block, observer, calls = context.source, RoutedObserver(), list[Call]()

    def restart() -> None:
        for seen in (calls, observer.top_k, observer.outputs):
            seen.clear()

    with ExitStack() as stack:
        if not block.block.is_whole_layer:
            stack.enter_context(remembering_calls(block.moe, calls, layer.batcher.keep))
        stack.enter_context(block.experts.observing(block.moe, observer))
        output = layer.run(inputs, restart)
    top_k, outputs = observer.top_k, observer.outputs
    if block.block.is_whole_layer:
        calls = [inputs]
    elif block.runs_on_tokens(calls):
        chosen = spaced(torch.arange(sum(map(len, outputs))), ERROR_TOKENS)
        calls = [pick_tokens(calls, chosen)]
        top_k, outputs = [pick_rows(top_k, chosen)], [pick_rows(outputs, chosen)]
    found = Observation(statistics=statistics, calls=calls, top_k=top_k, outputs=outputs, domains=())
    return output, found


def measure_curve(plan: CurvePlan, calibration: CalibrationSet, emit: Listener) -> MeasuredCurve:
    """Runs the source once, and every point that is measured along with it.

    Args:
        plan: The points.
        calibration: What the model runs on, with held-out sequences.
        emit: Called with progress and warnings.

    Raises:
        CalibrationError: If there is no text to measure on.
        VerificationError: If weights are not finite, or values overflow.
    """
    first, measured_ids = plan.points[0], calibration.measured_ids
    reason = why_not_measured(first, calibration)
    if reason is not None:
        raise CalibrationError(f"a curve is measured on held-out text, but {reason}.", hint="use more or other text")
    stored = stored_experts(first)
    points = [PointWork(plan=point, reducer=PointReducer(point, emit, stored)) for point in plan.points]
    rows = Rows[Key](
        {
            Original.CALIBRATION: calibration.token_ids,
            Original.HELD_OUT: measured_ids,
            **dict.fromkeys(sorted(plan.measured), measured_ids),
        },
        lengths=lengths(plan.model.skeleton, calibration.token_ids, first.calibration.source_length),
    )
    hidden_RSH = _run(plan, points, stored, calibration, rows, emit)
    places = rows.places()
    source_MSH = hidden_RSH[places[Original.HELD_OUT]]
    held_out = HeldOut(
        skeleton=plan.model.skeleton,
        device=batcher_for(first, measured_ids).device,
        ids_MS=measured_ids,
        domains=calibration.measured_domains,
        source_MSH=source_MSH,
        result_MSH=source_MSH,
        source_length=first.calibration.source_length,
    )
    return MeasuredCurve(
        points=points,
        held_out=held_out,
        results_MSH={number: hidden_RSH[places[number]] for number in sorted(plan.measured)},
    )


def _run(
    plan: CurvePlan,
    points: Sequence[PointWork],
    stored: StoredExperts,
    calibration: CalibrationSet,
    rows: Rows[Key],
    emit: Listener,
) -> Tensor:
    """Runs all sets of hidden states; returns them after the last norm of their model, ``[rows, S, H]``."""
    first, path = plan.points[0], plan.options.statistics
    batcher = batcher_for(first, calibration.token_ids)
    with ExitStack() as stack:
        statistics = None if path is None else stack.enter_context(open_statistics(path))
        curve = CurvePass(
            points,
            plan.measured,
            ObservingPass(first, batcher, statistics, domains=calibration.domains),
            stored=stored,
            batcher=batcher_for(first, calibration.measured_ids),
            rows=rows,
        )

        def visit(layer: StreamedLayer, inputs: Call) -> Any:
            output = curve.visit(layer, inputs)
            emit(StageAdvanced(Stage.OBSERVE, f"layer {layer.index}"))
            return output

        def on_read(tensor: LogicalTensor, parts: Mapping[str, Tensor], values: Tensor) -> None:
            stored.remember(tensor, parts)

        reader = stack.enter_context(open_reader(first, first.observing_order, emit))
        loader = stack.enter_context(open_loader(first, reader, batcher, on_read))
        loader.load(None)
        # An MTP head runs only if a later conversion is to find what was observed of it.
        visitor = Visitor(visit=visit, with_head=statistics is not None)
        length = first.calibration.source_length
        hidden_RSH = stream(plan.model.skeleton, loader, visitor, rows.batch, batcher=batcher, source_length=length)
        if statistics is not None:
            statistics.add_text(calibration, hidden_RSH[rows.places()[Original.HELD_OUT]])
            describe(statistics, first, calibration)
    return hidden_RSH
