"""The ways through a checkpoint: observe, observe and convert at once, or convert from statistics."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from hcsmoe_hub.checkpoint.writer import ShardWriter
from hcsmoe_hub.events import Listener, Stage, StageAdvanced
from hcsmoe_hub.layer.context import LayerContext
from hcsmoe_hub.layer.reducer import LayerReducer, rerun_on_sample
from hcsmoe_hub.layer.stored_experts import StoredExperts
from hcsmoe_hub.machine.allocator import return_freed_memory
from hcsmoe_hub.methods.clustering import LossTable
from hcsmoe_hub.model.expert_kinds import use_probe
from hcsmoe_hub.model.layer_loader import LayerLoader, free
from hcsmoe_hub.model.microbatch import MicroBatcher
from hcsmoe_hub.observation.observers import RoutedObserver
from hcsmoe_hub.observation.runnable_block import RunnableBlock
from hcsmoe_hub.observation.statistics import Call
from hcsmoe_hub.observation.statistics_file import StatisticsFile, StatisticsWriter
from hcsmoe_hub.observation.stored_states import LayerStates
from hcsmoe_hub.observation.watcher import BlockWatcher, Observation
from hcsmoe_hub.pipeline.losses import predict
from hcsmoe_hub.pipeline.merged_stream import MergedStream, hidden_of
from hcsmoe_hub.pipeline.reduced_layer import RunLayer, reduced_layer, run_routed
from hcsmoe_hub.pipeline.stream import StreamedLayer
from hcsmoe_hub.pipeline.streams import Part, Streams
from hcsmoe_hub.planning.conversion_plan import ConversionPlan
from hcsmoe_hub.report import LayerReport


class ResultWriter:
    """Writes what is not simply copied, under the names of the source.

    Args:
        plan: What is written.
        writer: Takes the weights of the result.
        emit: Called when a layer is written.
        stored: Has the experts that are written in the format of the source.
    """

    def __init__(self, plan: ConversionPlan, writer: ShardWriter, emit: Listener, stored: StoredExperts) -> None:
        self._plan = plan
        self._writer = writer
        self._emit = emit
        self._stored = stored

    def write(self, layer: int | None, changed: Mapping[str, Tensor]) -> None:
        """Writes one decoder layer, or what lies outside of them.

        Args:
            layer: Its index, its weights in memory; ``None`` outside the layers.
            changed: Tensors that differ from those in memory, by parameter name.
        """
        names = [name for name in self._plan.account.rewritten.get(layer, ()) if not self._stored.holds(name)]
        if names:
            skeleton = self._plan.model.skeleton
            state = skeleton.module.state_dict()
            # Factors take the place of matrices that the model has in memory.
            tensors = {name: changed[name] if name in changed else state[name] for name in names}
            for name, tensor in skeleton.to_stored(tensors, self._plan.model.groups[layer]).items():
                self._writer.write(name, tensor.to(self._plan.shards.tensors[name].dtype))
        for name, part in self._stored.take(layer).items():
            self._writer.write(name, part)
        if layer is not None:
            self._emit(StageAdvanced(Stage.CONVERT, f"layer {layer}", self._writer.bytes_written))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Work:
    """What layers are converted with.

    Attributes:
        plan: What to do.
        batcher: Cuts the calibration sequences into micro-batches, and knows the device.
        reducer: Converts a block.
        writer: Takes what changed.
    """

    plan: ConversionPlan
    batcher: MicroBatcher
    reducer: LayerReducer
    writer: ResultWriter

    def context(self, layer: int, originals: Mapping[str, Tensor]) -> LayerContext | None:
        """A decoder layer whose weights are in memory; ``None`` if it has no MoE block.

        Args:
            layer: Its index.
            originals: Its router tensors as stored, by parameter name.
        """
        block = find_block(self.plan, layer, self.batcher)
        if block is None:
            return None
        return LayerContext(source=block, result=self.plan.reduced, shape=self.plan.shape, originals=originals)

    def differs(self, report: LayerReport) -> bool:
        """Whether a converted layer computes anything else than before."""
        before, after = self.plan.model.settings, self.plan.settings
        is_routed_alike = replace(after, experts=before.experts) == before
        is_changed = report.experts < len(report.labels) or self.plan.is_narrower or self.plan.factors is not None
        return is_changed or not is_routed_alike


class ObservingPass:
    """Observes every MoE block of the model and keeps its statistics.

    Args:
        plan: What to observe.
        batcher: Cuts sequences into micro-batches.
        statistics: Where statistics go; ``None`` if they are not kept.
        domains: Domain of each calibration sequence.

    Attributes:
        losses: By layer, what the shapes that meet a target would lose, if the plan has yet to choose among them.
    """

    def __init__(
        self,
        plan: ConversionPlan,
        batcher: MicroBatcher,
        statistics: StatisticsWriter | None,
        *,
        domains: Sequence[str],
    ) -> None:
        _use_probe(plan)
        self._plan = plan
        self._batcher = batcher
        self._statistics = statistics
        self._domains = domains
        self.losses: dict[int, LossTable] = {}

    def observe(self, layer: StreamedLayer, inputs: Call, block: RunnableBlock) -> tuple[Any, Observation]:
        """Runs a layer over the calibration set; returns its output, and what was observed of its MoE block."""
        # Those that only choose a shape convert nothing.
        is_converting = not self._plan.is_choosing
        watcher = BlockWatcher(
            block,
            feature_tokens=self._plan.feature_tokens,
            seed=self._plan.calibration.seed,
            domains=self._domains,
            # A file of statistics serves every method.
            with_outputs=(self._plan.needs_mean_outputs and is_converting) or self._statistics is not None,
            with_gram=(self._plan.needs_gram and is_converting) or self._statistics is not None,
        )
        with watcher.watching(inputs):
            output = layer.run(inputs, watcher.restart)
        seen = watcher.observation()
        if self._statistics is not None:
            self._statistics.add(layer.index, seen.statistics)
            if self._plan.keeps_states:
                states = LayerStates(calls=seen.calls, output_BSH=hidden_of(output))
                self._statistics.add_states(layer.index, states)
        if self._plan.is_choosing:
            self._predict(layer, block, seen)
        return output, seen

    def _predict(self, layer: StreamedLayer, block: RunnableBlock, seen: Observation) -> None:
        context = LayerContext(source=block, result=None, shape=self._plan.shape, originals=layer.originals)
        self.losses[layer.index] = predict(self._plan, context, seen)
        if self._statistics is not None:
            self._statistics.add_losses(layer.index, self.losses[layer.index])

    def visit(self, layer: StreamedLayer, inputs: Call) -> Any:
        """All that happens to a decoder layer while it is in memory: it runs, and its MoE block is observed."""
        block = find_block(self._plan, layer.index, self._batcher)
        return layer.run(inputs) if block is None else self.observe(layer, inputs, block)[0]


class Observe(Protocol):
    """Finds out what there is to know of the MoE block of a layer.

    Returns the layer's output, only its hidden states or ``None`` where it did not run, and what was observed of its
    block.
    """

    def __call__(self, layer: StreamedLayer, inputs: Call | None, context: LayerContext) -> tuple[Any, Observation]: ...


class ConvertingPass:
    """Observes and converts every layer while it is in memory, and takes all sets of hidden states through it.

    Args:
        work: What layers are converted with.
        batcher: Cuts the held-out sequences into micro-batches.
        observe: Observes a block, or recalls what an earlier pass has observed.
        streams: The sets of hidden states.
        merged: Finds what blocks are fitted to in the reduced model; ``None`` if they are fitted to the source's.
    """

    def __init__(
        self,
        work: Work,
        batcher: MicroBatcher,
        observe: Observe,
        *,
        streams: Streams,
        merged: MergedStream | None,
    ) -> None:
        _use_probe(work.plan)
        self._work = work
        self._batcher = batcher
        self._observe = observe
        self._streams = streams
        self._merged = merged
        self._is_apart = False

    def visit(self, layer: StreamedLayer, inputs: Call) -> Any:
        """All that happens to a decoder layer while it is in memory: run, observe, convert, write."""
        found = self._streams.split(inputs)
        if layer.index >= self._work.plan.model.skeleton.depth:
            # What an MTP head costs is not measured: it predicts other tokens.
            found = {part: call for part, call in found.items() if not part.is_measured}
        context = self._work.context(layer.index, layer.originals)
        outputs = self._run_plain(layer, found) if context is None else self._convert(layer, found, context)
        return self._streams.join(outputs)

    def _run_plain(self, layer: StreamedLayer, found: Mapping[Part, Call]) -> dict[Part, Any]:
        """Runs a layer that has no experts, the same in both models."""
        outputs = self._run(layer, found, StreamedLayer.run, is_reduced=False)
        outputs |= self._run_alone(layer, found, StreamedLayer.run)
        self._work.writer.write(layer.index, {})
        return outputs | self._reduced(layer, found, outputs, StreamedLayer.run)

    def _convert(self, layer: StreamedLayer, found: Mapping[Part, Call], context: LayerContext) -> dict[Part, Any]:
        """Converts a layer between its run in the source and that in the reduced model."""
        output, seen = self._observe(layer, found.get(Part.SOURCE), context)
        run = partial(_run_source, context.source)
        outputs = {Part.SOURCE: output} if Part.SOURCE in found else {}
        outputs |= self._run(
            layer, {part: call for part, call in found.items() if part.is_measured}, run, is_reduced=False
        )
        outputs |= self._run_alone(layer, found, run)
        fitted = seen
        if self._merged is not None and self._is_apart:
            fitted = self._merged.wanted(layer, context, inputs=found[Part.REDUCED], output=output, seen=seen)
        changed = self._work.reducer.reduce(context, seen, fitted=fitted)
        self._work.writer.write(layer.index, changed)
        report = self._work.reducer.reports[-1]
        self._is_apart |= self._work.differs(report)
        if not self._is_apart or not any(part.is_reduced for part in found):
            return outputs | self._reduced(layer, found, outputs, StreamedLayer.run)
        # Those that ran alone did so in case this layer had turned out to be the same.
        outputs = {part: output for part, output in outputs.items() if not part.is_reduced}
        with reduced_layer(context, changed, report.labels) as reduced:
            if self._merged is not None and reduced.block is not None:
                advanced = self._merged.advance(reduced.block, fitted.calls)
                if advanced is not None:
                    outputs[Part.REDUCED] = advanced
            left = {part: call for part, call in found.items() if part not in outputs}
            return outputs | self._reduced(layer, left, outputs, reduced.run)

    def _run_alone(self, layer: StreamedLayer, found: Mapping[Part, Call], run: RunLayer) -> dict[Part, Any]:
        """Runs the sets in the reduced model that follow none in the source, as long as the two models are the same."""
        if self._is_apart:
            return {}
        alone = {part: call for part, call in found.items() if part.original not in found}
        return self._run(layer, alone, run, is_reduced=True)

    def _reduced(
        self, layer: StreamedLayer, found: Mapping[Part, Call], outputs: Mapping[Part, Any], run: RunLayer
    ) -> dict[Part, Any]:
        """The outputs in the reduced model; until the first layer that differs, they are those in the source."""
        if self._is_apart:
            return self._run(layer, found, run, is_reduced=True)
        return {part: outputs[part if part in outputs else part.original] for part in found if part.is_reduced}

    def _run(
        self, layer: StreamedLayer, found: Mapping[Part, Call], run: RunLayer, *, is_reduced: bool
    ) -> dict[Part, Any]:
        """Runs the sets of one model through a layer."""
        held_out = replace(layer, batcher=self._batcher)
        return {
            part: run(held_out if part.is_measured else layer, call)
            for part, call in found.items()
            if part.is_reduced is is_reduced
        }


def observing(observer: ObservingPass) -> Observe:
    """Observes every block while its layer runs over the calibration sequences."""

    def observe(layer: StreamedLayer, inputs: Call | None, context: LayerContext) -> tuple[Any, Observation]:
        assert inputs is not None, "there are calibration sequences to observe on"
        return observer.observe(layer, inputs, context.source)

    return observe


def recalling(statistics: StatisticsFile) -> Observe:
    """Recalls what was observed of every block; layers of the source do not run over calibration sequences."""
    return lambda layer, inputs, context: _recall(statistics, context)


def convert_from_statistics(work: Work, statistics: StatisticsFile, loader: LayerLoader, layers: Iterable[int]) -> None:
    """Converts layers without running the model: of a layer, only its MoE block runs.

    Args:
        work: What layers are converted with.
        statistics: What an earlier run observed.
        loader: Brings the weights of a layer.
        layers: Their indices.
    """
    _use_probe(work.plan)
    with torch.no_grad():
        for layer in layers:
            changed, context = {}, work.context(layer, loader.take(layer))
            if context is not None:
                _, seen = _recall(statistics, context)
                changed = work.reducer.reduce(context, seen, fitted=seen)
            work.writer.write(layer, changed)
            free(work.plan.model.skeleton.layers[layer])
            return_freed_memory()


def _recall(statistics: StatisticsFile, layer: LayerContext) -> tuple[Tensor | None, Observation]:
    """What was observed of a block, its choices and outputs computed again from its inputs.

    Returns:
        The hidden states that left the layer in the source, and the observation; where a file holds no hidden states,
        ``None`` and what the block does on its sample.
    """
    found = statistics.layer(layer.block.layer)
    if statistics.has_states:
        states = statistics.states(layer.block.layer, layer.source.skeleton.dtype)
        run = layer.source.rerun(states.calls, RoutedObserver)
        return states.output_BSH, Observation(
            statistics=found,
            calls=states.calls,
            top_k=run.top_k,
            outputs=run.outputs,
            domains=statistics.text().domains,
        )
    assert found.sample is not None, "a statistics file holds a sample of every block"
    seen = Observation(statistics=found, calls=[found.sample], top_k=[], outputs=[], domains=("",))
    observer = rerun_on_sample(layer, seen)
    seen.top_k, seen.outputs = observer.top_k, observer.outputs
    return None, seen


def _run_source(block: RunnableBlock, layer: StreamedLayer, inputs: Call) -> Any:
    """Runs a layer with its block in the source."""
    return run_routed(layer, block, inputs)


def find_block(plan: ConversionPlan, layer: int, batcher: MicroBatcher) -> RunnableBlock | None:
    """The MoE block of a decoder layer of the source, if it has one."""
    found = [block for block in plan.model.blocks if block.layer == layer]
    return RunnableBlock(skeleton=plan.model.skeleton, block=found[0], batcher=batcher) if found else None


def _use_probe(plan: ConversionPlan) -> None:
    """Lets the experts of a plan's models run through observers."""
    for skeleton in filter(None, (plan.model.skeleton, plan.reduced)):
        use_probe(skeleton.module)
