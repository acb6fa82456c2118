"""The ways through a checkpoint: observe, observe and convert at once, or convert from statistics."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hcsmoe_hub.checkpoint.writer import ShardWriter
from hcsmoe_hub.events import Listener, Stage, StageAdvanced
from hcsmoe_hub.layer.reducer import LayerReducer
from hcsmoe_hub.machine.allocator import return_freed_memory
from hcsmoe_hub.model.blocks import MoEBlock
from hcsmoe_hub.model.experts import PROBE, register_probe
from hcsmoe_hub.model.layer_loader import LayerLoader, free
from hcsmoe_hub.observation.statistics_file import StatisticsFile, StatisticsWriter
from hcsmoe_hub.observation.watcher import BlockWatcher, Observation
from hcsmoe_hub.pipeline.merged_stream import MergedStream
from hcsmoe_hub.pipeline.stream import Visitor
from hcsmoe_hub.planning.conversion_plan import ConversionPlan


def use_probe(plan: ConversionPlan) -> None:
    """Lets the experts of a plan's models run through observers."""
    register_probe()
    for skeleton in filter(None, (plan.model.skeleton, plan.reduced)):
        if skeleton.module._can_set_experts_implementation():
            skeleton.module.set_experts_implementation(PROBE)


class ResultWriter:
    """Writes what is not simply copied, under the names of the source."""

    def __init__(self, plan: ConversionPlan, writer: ShardWriter) -> None:
        self._plan = plan
        self._writer = writer

    @property
    def bytes_written(self) -> int:
        """Bytes of the result so far."""
        return self._writer.bytes_written

    def write(self, layer: int | None, changed: Mapping[str, Tensor]) -> None:
        """Writes one decoder layer, or what lies outside of them.

        Args:
            layer: Its index, its weights in memory; ``None`` outside the layers.
            changed: Tensors that differ from those in memory, by parameter name.
        """
        names = self._plan.account.rewritten.get(layer)
        if not names:
            return
        skeleton = self._plan.model.skeleton
        state = skeleton.module.state_dict()
        tensors = {name: changed.get(name, state[name]) for name in names}
        conversions = self._plan.model.groups[layer].conversions
        for name, tensor in skeleton.to_stored(tensors, conversions).items():
            self._writer.write(name, tensor.to(self._plan.shards.tensors[name].dtype))


class ObservingPass(Visitor):
    """Watches every MoE block of the model and keeps its statistics.

    Args:
        plan: What to watch.
        statistics: Where statistics go, if they are kept.
        emit: Called with progress.
    """

    def __init__(self, plan: ConversionPlan, statistics: StatisticsWriter | None, emit: Listener) -> None:
        use_probe(plan)
        self._plan = plan
        self._statistics = statistics
        self._emit = emit
        self._blocks = {block.layer: block for block in plan.model.blocks}
        self._watcher: BlockWatcher | None = None

    def enter(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        block = self._blocks.get(layer)
        if block is not None:
            self._watcher = BlockWatcher(
                self._plan.model,
                block,
                feature_tokens=self._plan.feature_tokens,
                seed=self._plan.calibration.seed,
            )
            self._watcher.enter(args, kwargs)

    def start(self, layer: int) -> None:
        if layer in self._blocks:
            assert self._watcher is not None
            self._watcher.start()

    def leave(self, layer: int | None, module: nn.Module, originals: Mapping[str, Tensor]) -> None:
        block = None if layer is None else self._blocks.get(layer)
        self.passed(layer, {} if block is None else self._finish(block, originals))

    def _finish(self, block: MoEBlock, originals: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Ends the watch; what was observed is forgotten when it is worked on."""
        assert self._watcher is not None
        seen, self._watcher = self._watcher.finish(), None
        if self._statistics is not None:
            self._statistics.add(block.layer, seen.statistics)
        return self.observed(block, originals, seen)

    def observed(self, block: MoEBlock, originals: Mapping[str, Tensor], seen: Observation) -> Mapping[str, Tensor]:
        """Works on a block that was observed; returns its tensors that change."""
        return {}

    def passed(self, layer: int | None, changed: Mapping[str, Tensor]) -> None:
        """Finishes a layer, or what lies outside of them (``None``)."""
        if layer is not None:
            self._emit(StageAdvanced(Stage.OBSERVE, f"layer {layer}"))


class ConvertingPass(ObservingPass):
    """Observes and converts every layer while it is in memory.

    Args:
        plan: What to do.
        statistics: Where statistics go, if they are kept.
        emit: Called with progress.
        reducer: Converts a block.
        writer: Takes what changed.
        merged: The reduced model's hidden states, if its layers are fitted on them.
    """

    def __init__(
        self,
        plan: ConversionPlan,
        statistics: StatisticsWriter | None,
        emit: Listener,
        *,
        reducer: LayerReducer,
        writer: ResultWriter,
        merged: MergedStream | None,
    ) -> None:
        super().__init__(plan, statistics, emit)
        self._reducer = reducer
        self._writer = writer
        self._merged = merged

    def observed(self, block: MoEBlock, originals: Mapping[str, Tensor], seen: Observation) -> Mapping[str, Tensor]:
        fitted = seen if self._merged is None else self._merged.observe(block, seen)
        return self._reducer.reduce(block, originals, seen, fitted)

    def passed(self, layer: int | None, changed: Mapping[str, Tensor]) -> None:
        self._writer.write(layer, changed)
        if layer is not None and self._merged is not None:
            self._merged.advance(layer, self._blocks.get(layer), changed)
        if layer is not None:
            self._emit(StageAdvanced(Stage.CONVERT, f"layer {layer}", self._writer.bytes_written))


def convert_from_statistics(
    plan: ConversionPlan,
    statistics: StatisticsFile,
    loader: LayerLoader,
    *,
    reducer: LayerReducer,
    writer: ResultWriter,
    emit: Listener,
) -> None:
    """Converts every layer without running the model: reads weights only.

    Args:
        plan: What to do.
        statistics: What an earlier run observed.
        loader: Brings the weights of a layer.
        reducer: Converts a block.
        writer: Takes what changed.
        emit: Called with progress.
    """
    use_probe(plan)
    blocks = {block.layer: block for block in plan.model.blocks}
    loader.load(None)
    writer.write(None, {})
    with torch.no_grad():
        for layer, module in enumerate(plan.model.skeleton.layers):
            originals, changed = loader.load(layer), {}
            if layer in blocks:
                seen = _recall(statistics, blocks[layer], reducer)
                changed = reducer.reduce(blocks[layer], originals, seen, seen)
            writer.write(layer, changed)
            free(module)
            return_freed_memory()
            emit(StageAdvanced(Stage.CONVERT, f"layer {layer}", writer.bytes_written))


def _recall(statistics: StatisticsFile, block: MoEBlock, reducer: LayerReducer) -> Observation:
    """What was observed of a block, its choices and outputs computed again on the sampled tokens."""
    found = statistics.layer(block.layer)
    assert found.sample is not None, "a statistics file holds a sample of every block"
    seen = Observation(statistics=found, calls=[found.sample], top_k=[], outputs=[])
    observer = reducer.rerun_on_sample(block, seen)
    seen.top_k, seen.outputs = observer.top_k, observer.outputs
    return seen
