"""Observes the MoE blocks of a model while its layers run."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor

from hcsmoe_hub.events import Listener, Stage, StageAdvanced
from hcsmoe_hub.layer.context import LayerContext
from hcsmoe_hub.methods.clustering import LossTable
from hcsmoe_hub.model.expert_kinds import use_probe
from hcsmoe_hub.model.microbatch import MicroBatcher
from hcsmoe_hub.model.skeleton import Skeleton
from hcsmoe_hub.observation.runnable_block import RunnableBlock
from hcsmoe_hub.observation.statistics import Call
from hcsmoe_hub.observation.statistics_writer import StatisticsWriter
from hcsmoe_hub.observation.stored_states import LayerStates
from hcsmoe_hub.observation.wanted import Wanted
from hcsmoe_hub.observation.watcher import BlockWatcher, Observation
from hcsmoe_hub.pipeline.layer_steps import LayerSteps
from hcsmoe_hub.pipeline.losses import predict
from hcsmoe_hub.pipeline.merged_stream import hidden_of
from hcsmoe_hub.pipeline.packing import shared_objects
from hcsmoe_hub.pipeline.sharding import all_states
from hcsmoe_hub.pipeline.stream import StreamedLayer, Visitor
from hcsmoe_hub.planning.conversion_plan import ConversionPlan


class ObservingPass:
    """Observes every MoE block of the model and keeps its statistics.

    Args:
        plan: What to observe.
        batcher: Cuts sequences into micro-batches.
        statistics: Where statistics go; ``None`` if this rank does not keep them.
        domains: Domain of each calibration sequence.
        collects: Whether another rank keeps them.

    Attributes:
        batcher: The same.
        losses: By layer, what the shapes that meet a target would lose, if the plan has yet to choose among them.
    """

    def __init__(
        self,
        plan: ConversionPlan,
        batcher: MicroBatcher,
        statistics: StatisticsWriter | None,
        *,
        domains: Sequence[str],
        collects: bool = False,
    ) -> None:
        use_probes(plan)
        self._plan = plan
        self.batcher = batcher
        self._statistics = statistics
        self._domains = domains
        self._collects = collects or statistics is not None
        self.losses: dict[int, LossTable] = {}

    @property
    def source_length(self) -> int:
        """Tokens of a sequence that an encoder reads; 0 without one."""
        return self._plan.calibration.source_length

    def observe(self, layer: StreamedLayer, inputs: Call, block: RunnableBlock) -> tuple[Any, Observation]:
        """Runs a layer over the calibration set; returns its output, and what was observed of its MoE block."""
        watcher = BlockWatcher(
            block,
            feature_tokens=self._plan.feature_tokens,
            seed=self._plan.calibration.seed,
            domains=self._domains,
            # A file of statistics serves every method.
            wanted=Wanted() if self._collects else self._plan.wanted,
        )
        with watcher.watching(inputs):
            output = layer.run(inputs, watcher.restart)
        seen = watcher.observation()
        if self._statistics is not None:
            self._statistics.add(layer.index, seen.statistics)
        if self._collects and self._plan.keeps_states:
            own = LayerStates(calls=seen.calls, output_BSH=hidden_of(output))
            states = all_states(own, is_whole_layer=block.block.is_whole_layer)
            if self._statistics is not None:
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
        block = find_block(self._plan, layer.index, self.batcher)
        return layer.run(inputs) if block is None else self.observe(layer, inputs, block)[0]


class ObservedLayers:
    """Observes every layer that an interrupted run has not, and keeps what each leaves.

    Args:
        observer: Observes a layer.
        steps: The layers of the pass.
        emit: Called with every layer.
        skeleton: The model.
        token_ids: ``[B, S]`` int64, what it runs on.
    """

    def __init__(
        self, observer: ObservingPass, steps: LayerSteps, emit: Listener, *, skeleton: Skeleton, token_ids: Tensor
    ) -> None:
        self._observer = observer
        self._skeleton = skeleton
        self._token_ids = token_ids
        self._steps = steps
        self._emit = emit
        # What left an encoder.
        self._encoded_RSH: Tensor | None = None
        for layer, kept in enumerate(steps.results):
            if kept:
                observer.losses[layer] = LossTable(**kept)
        if steps.states is not None:
            observer.batcher.batch = steps.states["batch"]
            self._encoded_RSH = steps.states["encoded"]

    @property
    def visitor(self) -> Visitor:
        """What happens to all layers, those that an interrupted run has done included."""
        return Visitor(
            visit=self.visit,
            recall=self.recall,
            last=self._steps.last,
            on_encoded=self._keep_encoded,
            encoded_RSH=self._encoded_RSH,
        )

    def _keep_encoded(self, encoded_RSH: Tensor) -> None:
        self._encoded_RSH = encoded_RSH

    def visit(self, layer: StreamedLayer, inputs: Call) -> Any:
        """All that happens to a decoder layer while it is in memory."""
        output = self._observer.visit(layer, inputs)
        self._steps.confirm()
        self._steps.check(self._skeleton, layer.index, output, self._token_ids, self._observer.source_length)
        # Nothing comes after a head.
        is_last = layer.index >= self._skeleton.depth
        self._steps.done(
            layer.index,
            results=_fields(self._observer.losses.get(layer.index)),
            states=None if is_last else self._states(inputs, output),
        )
        self._emit(StageAdvanced(Stage.OBSERVE, f"layer {layer.index}"))
        return output

    def _states(self, inputs: Call, output: Any) -> dict[str, Any]:
        """What the next layers depend on."""
        shared = shared_objects((inputs.args, inputs.kwargs))
        return {
            "output": output,
            "shared": shared,
            "batch": self._observer.batcher.batch,
            "encoded": self._encoded_RSH,
        }

    def recall(self, inputs: Call) -> Any:
        """What left the last layer that an interrupted run has done, in place of running a layer."""
        states, batcher = self._steps.states, self._observer.batcher
        for target, values in zip(shared_objects((inputs.args, inputs.kwargs)), states["shared"], strict=True):
            target.update(batcher.keep(values))
        output = batcher.keep(states["output"])
        batcher.settle()
        return output


def _fields(losses: LossTable | None) -> dict[str, Any]:
    """What a loss table is made of; nothing where there is none."""
    return {} if losses is None else {field.name: getattr(losses, field.name) for field in fields(losses)}


def find_block(plan: ConversionPlan, layer: int, batcher: MicroBatcher) -> RunnableBlock | None:
    """The MoE block of a decoder layer of the source, if it has one."""
    found = [block for block in plan.model.blocks if block.layer == layer]
    return RunnableBlock(skeleton=plan.model.skeleton, block=found[0], batcher=batcher) if found else None


def use_probes(plan: ConversionPlan) -> None:
    """Lets the experts of a plan's models run through observers."""
    for skeleton in filter(None, (plan.model.skeleton, plan.reduced)):
        use_probe(skeleton.module)
