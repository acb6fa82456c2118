"""The ways through a checkpoint: observe, observe and convert at once, or convert from statistics."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hcsmoe_hub.checkpoint.writer import ShardWriter
from hcsmoe_hub.events import Listener, Stage, StageAdvanced
from hcsmoe_hub.layer.context import LayerContext
from hcsmoe_hub.layer.reducer import LayerReducer, rerun_on_sample
from hcsmoe_hub.layer.stored_experts import StoredExperts
from hcsmoe_hub.machine.allocator import return_freed_memory
from hcsmoe_hub.model.blocks import MoEBlock
from hcsmoe_hub.model.expert_kinds import use_probe
from hcsmoe_hub.model.layer_loader import LayerLoader, free
from hcsmoe_hub.model.microbatch import MicroBatcher
from hcsmoe_hub.observation.runnable_block import RunnableBlock
from hcsmoe_hub.observation.statistics import Call
from hcsmoe_hub.observation.statistics_file import StatisticsFile, StatisticsWriter
from hcsmoe_hub.observation.watcher import BlockWatcher, Observation
from hcsmoe_hub.pipeline.merged_stream import MergedStream
from hcsmoe_hub.pipeline.stream import StreamedLayer
from hcsmoe_hub.planning.conversion_plan import ConversionPlan


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
            tensors = {name: changed.get(name, state[name]) for name in names}
            for name, tensor in skeleton.to_stored(tensors, self._plan.model.groups[layer]).items():
                self._writer.write(name, tensor.to(self._plan.shards.tensors[name].dtype))
        for name, part in self._stored.take(layer).items():
            self._writer.write(name, part)
        if layer is not None:
            self._emit(StageAdvanced(Stage.CONVERT, f"layer {layer}", self._writer.bytes_written))


class ObservingPass:
    """Observes every MoE block of the model and keeps its statistics.

    Args:
        plan: What to observe.
        batcher: Cuts sequences into micro-batches.
        statistics: Where statistics go; ``None`` if they are not kept.
        domains: Domain of each calibration sequence.
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
        self._blocks = {block.layer: block for block in plan.model.blocks}

    def block(self, layer: int) -> RunnableBlock | None:
        """The MoE block of a decoder layer of the source, if it has one."""
        block = self._blocks.get(layer)
        return None if block is None else _runnable(self._plan, block, self._batcher)

    def observe(self, layer: StreamedLayer, inputs: Call, block: RunnableBlock) -> tuple[Any, Observation]:
        """Runs a layer over the calibration set; returns its output, and what was observed of its MoE block."""
        watcher = BlockWatcher(
            block,
            experts=self._plan.model.settings.experts,
            feature_tokens=self._plan.feature_tokens,
            seed=self._plan.calibration.seed,
            domains=self._domains,
        )
        with watcher.watching(inputs):
            output = layer.run(inputs, watcher.restart)
        seen = watcher.observation()
        if self._statistics is not None:
            self._statistics.add(layer.index, seen.statistics)
        return output, seen

    def visit(self, layer: StreamedLayer, inputs: Call) -> Any:
        """All that happens to a decoder layer while it is in memory: it runs, and its MoE block is observed."""
        block = self.block(layer.index)
        return layer.run(inputs) if block is None else self.observe(layer, inputs, block)[0]


class ConvertingPass:
    """Observes and converts every layer while it is in memory.

    Args:
        plan: What to do.
        observing: Observes a block.
        reducer: Converts a block.
        writer: Takes what changed.
        merged: The reduced model's hidden states; ``None`` if its layers are fitted on the source's.
    """

    def __init__(
        self,
        plan: ConversionPlan,
        observing: ObservingPass,
        reducer: LayerReducer,
        *,
        writer: ResultWriter,
        merged: MergedStream | None,
    ) -> None:
        self._plan = plan
        self._observing = observing
        self._reducer = reducer
        self._writer = writer
        self._merged = merged

    def visit(self, layer: StreamedLayer, inputs: Call) -> Any:
        """All that happens to a decoder layer while it is in memory: run, observe, convert, write."""
        merged, changed, context = self._merged, dict[str, Tensor](), None
        own, reduced = (inputs, None) if merged is None else merged.split(inputs)
        block = self._observing.block(layer.index)
        if block is None:
            output = layer.run(own)
        else:
            output, seen = self._observing.observe(layer, own, block)
            context = LayerContext(source=block, result=self._plan.reduced, originals=layer.originals)
            fitted = seen
            if merged is not None and reduced is not None:
                fitted = merged.wanted(layer, context, inputs=reduced, output=output, seen=seen)
            changed = self._reducer.reduce(context, seen, fitted=fitted)
        self._writer.write(layer.index, changed)
        if merged is not None and reduced is not None:
            output = merged.join(output, merged.advance(layer, context, inputs=reduced, output=output, changed=changed))
        return output


def convert_from_statistics(
    plan: ConversionPlan,
    statistics: StatisticsFile,
    loader: LayerLoader,
    *,
    reducer: LayerReducer,
    writer: ResultWriter,
    batcher: MicroBatcher,
) -> None:
    """Converts every layer without running the model: reads weights only.

    Args:
        plan: What to do.
        statistics: What an earlier run observed.
        loader: Brings the weights of a layer.
        reducer: Converts a block.
        writer: Takes what changed.
        batcher: Knows the device.
    """
    _use_probe(plan)
    blocks = {block.layer: block for block in plan.model.blocks}
    with torch.no_grad():
        for layer, module in enumerate(plan.model.skeleton.layers):
            originals, changed = loader.load(layer), {}
            if layer in blocks:
                source = _runnable(plan, blocks[layer], batcher)
                context = LayerContext(source=source, result=plan.reduced, originals=originals)
                seen = _recall(statistics, context)
                changed = reducer.reduce(context, seen, fitted=seen)
            writer.write(layer, changed)
            free(module)
            return_freed_memory()


def _recall(statistics: StatisticsFile, layer: LayerContext) -> Observation:
    """What was observed of a block, its choices and outputs computed again on the sampled tokens."""
    found = statistics.layer(layer.block.layer)
    assert found.sample is not None, "a statistics file holds a sample of every block"
    seen = Observation(statistics=found, calls=[found.sample], top_k=[], outputs=[], domains=("",))
    observer = rerun_on_sample(layer, seen)
    seen.top_k, seen.outputs = observer.top_k, observer.outputs
    return seen


def _runnable(plan: ConversionPlan, block: MoEBlock, batcher: MicroBatcher) -> RunnableBlock:
    return RunnableBlock(skeleton=plan.model.skeleton, block=block, batcher=batcher)


def _use_probe(plan: ConversionPlan) -> None:
    """Lets the experts of a plan's models run through observers."""
    for skeleton in filter(None, (plan.model.skeleton, plan.reduced)):
        use_probe(skeleton.module)
