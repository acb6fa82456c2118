"""The ways through a checkpoint: observe, observe and convert at once, or convert from statistics."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from typing import Any, Protocol

import torch
from torch import Tensor

from hcsmoe_hub.layer.context import LayerContext
from hcsmoe_hub.layer.kept_layers import kept_layer
from hcsmoe_hub.layer.reducer import LayerReducer
from hcsmoe_hub.layer.stored_experts import StoredExperts
from hcsmoe_hub.machine.accelerator import is_host
from hcsmoe_hub.machine.allocator import return_freed_memory
from hcsmoe_hub.model.layer_loader import LayerLoader, free
from hcsmoe_hub.model.microbatch import MicroBatcher
from hcsmoe_hub.observation.observers import RoutedObserver
from hcsmoe_hub.observation.runnable_block import RunnableBlock
from hcsmoe_hub.observation.statistics import Call
from hcsmoe_hub.observation.statistics_file import StatisticsFile
from hcsmoe_hub.observation.watcher import Observation
from hcsmoe_hub.pipeline.layer_steps import LayerSteps
from hcsmoe_hub.pipeline.merged_stream import MergedStream
from hcsmoe_hub.pipeline.observing_pass import ObservingPass, find_block, use_probes
from hcsmoe_hub.pipeline.packing import shared_objects
from hcsmoe_hub.pipeline.reduced_layer import RunLayer, reduced_layer, run_routed
from hcsmoe_hub.pipeline.result_writer import ResultWriter
from hcsmoe_hub.pipeline.sharding import own_states, own_tokens
from hcsmoe_hub.pipeline.stream import StreamedLayer, Visitor
from hcsmoe_hub.pipeline.streams import Part, Streams
from hcsmoe_hub.planning.conversion_plan import ConversionPlan
from hcsmoe_hub.report import LayerReport


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Work:
    """What layers are converted with.

    Attributes:
        plan: What to do.
        batcher: Cuts the calibration sequences into micro-batches, and knows the device.
        reducer: Converts a block.
        writer: Takes what changed.
        stored: Rounds experts to the format of the source.
        steps: Keeps what every layer leaves.
    """

    plan: ConversionPlan
    batcher: MicroBatcher
    reducer: LayerReducer
    writer: ResultWriter
    stored: StoredExperts
    steps: LayerSteps

    def context(self, layer: int, originals: Mapping[str, Tensor]) -> LayerContext | None:
        """A decoder layer whose weights are in memory; ``None`` if it has no MoE block.

        Args:
            layer: Its index.
            originals: Its router tensors as stored, by parameter name.
        """
        block = find_block(self.plan, layer, self.batcher)
        if block is None:
            return None
        experts = next(block.experts.module.parameters())
        return LayerContext(
            source=block,
            result=self.plan.reduced,
            shape=self.plan.shape,
            originals=originals,
            experts_on_host=is_host(experts.device) and not is_host(self.batcher.device),
        )

    def reduce(self, layer: LayerContext, seen: Observation, *, fitted: Observation) -> dict[str, Tensor]:
        """Converts a block while nothing else needs memory for experts; see ``LayerReducer.reduce``."""
        self.settle()
        return self.reducer.reduce(layer, seen, fitted=fitted)

    def settle(self) -> None:
        """Waits until the last layer is written and kept."""
        self.writer.settle()
        self.steps.confirm()

    def done(self, layer: int, states: Any = None) -> None:
        """Notes that a layer is converted: it is kept when the writer has come that far.

        Args:
            layer: Its index.
            states: What left it; ``None`` where the model does not run.
        """
        self.steps.done(layer, results=kept_layer(self.reducer, layer), states=states)

    def differs(self, report: LayerReport) -> bool:
        """Whether a converted layer computes anything else than before."""
        before, after = self.plan.model.settings, self.plan.settings
        is_routed_alike = replace(after, experts=before.experts) == before
        is_changed = report.experts < len(report.labels) or self.plan.is_narrower or self.plan.factors is not None
        return is_changed or not is_routed_alike


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
        use_probes(work.plan)
        self._work = work
        self._batcher = batcher
        self._observe = observe
        self._streams = streams
        self._merged = merged
        states = work.steps.states
        # What left an encoder, which every layer of the decoder reads.
        self._encoded_RSH: Tensor | None = None
        self._is_apart = states is not None and states["is_apart"]
        if states is not None:
            self._restore(states)

    def _restore(self, states: Mapping[str, Any]) -> None:
        """Goes on with what left the last layer that an interrupted run has done."""
        if self._merged is not None:
            self._merged.has_warned = states["has_warned"]
        for batcher, size in zip((self._work.batcher, self._batcher), states["batches"], strict=True):
            batcher.batch = size
        keep, part_of = self._work.batcher.keep, Part.__getitem__
        self._left = {part_of(name): keep(output) for name, output in states["outputs"].items()}
        self._shared = {part_of(name): keep(objects) for name, objects in states["shared"].items()}
        self._encoded_RSH = states["encoded"]
        self._work.batcher.settle()

    def recall(self, inputs: Call) -> Any:
        """What left the last layer that an interrupted run has done, in place of running a layer."""
        found = self._streams.split(inputs)
        for part, call in found.items():
            for target, values in zip(shared_objects((call.args, call.kwargs)), self._shared[part], strict=True):
                target.update(values)
        return self._streams.join({part: output for part, output in self._left.items() if part in found})

    def visitor(self, *, with_head: bool) -> Visitor:
        """What happens to all layers, those that an interrupted run has done included.

        Args:
            with_head: Whether an MTP head runs, if there is one.
        """
        return Visitor(
            visit=self.visit,
            recall=self.recall,
            last=self._work.steps.last,
            with_head=with_head,
            on_encoded=self._keep_encoded,
            encoded_RSH=self._encoded_RSH,
        )

    def _keep_encoded(self, encoded_RSH: Tensor) -> None:
        self._encoded_RSH = encoded_RSH

    def _states(self, found: Mapping[Part, Call], outputs: Mapping[Part, Any]) -> dict[str, Any]:
        """What the next layers, and those after them, depend on."""
        return {
            "encoded": self._encoded_RSH,
            "is_apart": self._is_apart,
            "has_warned": self._merged is not None and self._merged.has_warned,
            "batches": [self._work.batcher.batch, self._batcher.batch],
            "outputs": {part.name: output for part, output in outputs.items()},
            "shared": {part.name: shared_objects((call.args, call.kwargs)) for part, call in found.items()},
        }

    def visit(self, layer: StreamedLayer, inputs: Call) -> Any:
        """All that happens to a decoder layer while it is in memory: run, observe, convert, write."""
        found = self._streams.split(inputs)
        if layer.index >= self._work.plan.model.skeleton.depth:
            # What an MTP head costs is not measured: it predicts other tokens.
            found = {part: call for part, call in found.items() if not part.is_measured}
        calls = [(call.args, call.kwargs) for call in found.values()]
        self._work.steps.begin(layer.module, calls)
        context = self._work.context(layer.index, layer.originals)
        outputs = self._run_plain(layer, found) if context is None else self._convert(layer, found, context)
        is_head = layer.index >= self._work.plan.model.skeleton.depth
        output = next(iter(outputs.values()))
        plan = self._work.plan
        self._work.steps.check(
            plan.model.skeleton, layer.index, output, self._streams.batch, plan.calibration.source_length
        )
        # Nothing comes after a head.
        self._work.done(layer.index, None if is_head else self._states(found, outputs))
        return self._streams.join(outputs)

    def _run_plain(self, layer: StreamedLayer, found: Mapping[Part, Call]) -> dict[Part, Any]:
        """Runs a layer that has no experts, the same in both models."""
        outputs = self._run(layer, found, StreamedLayer.run, is_reduced=False)
        outputs |= self._run_alone(layer, found, StreamedLayer.run)
        self._work.settle()
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
        changed = self._work.reduce(context, seen, fitted=fitted)
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


def convert_from_statistics(work: Work, statistics: StatisticsFile, loader: LayerLoader, layers: Sequence[int]) -> None:
    """Converts layers without running the model: of a layer, only its MoE block runs.

    Args:
        work: What layers are converted with.
        statistics: What an earlier run observed.
        loader: Brings the weights of a layer.
        layers: Their indices.
    """
    use_probes(work.plan)
    with torch.no_grad():
        for layer, following in zip_longest(layers, layers[1:]):
            changed, context = {}, work.context(layer, loader.take(layer))
            if following is not None:
                loader.prefetch(following)
            # Loading and merging at once would add up to a higher peak.
            loader.settle()
            if context is not None:
                _, seen = _recall(statistics, context)
                changed = work.reduce(context, seen, fitted=seen)
            work.writer.write(layer, changed)
            work.done(layer)
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
        states = own_states(statistics.states(layer.block.layer, layer.source.skeleton.dtype))
        run = layer.source.rerun(states.calls, RoutedObserver)
        return states.output_BSH, Observation(
            statistics=found,
            calls=states.calls,
            top_k=run.top_k,
            outputs=run.outputs,
            domains=statistics.text().domains,
        )
    assert found.sample is not None, "a statistics file holds a sample of every block"
    seen = Observation(statistics=found, calls=[own_tokens(found.sample)], top_k=[], outputs=[], domains=("",))
    observer = layer.source.rerun(seen.calls, RoutedObserver)
    seen.top_k, seen.outputs = observer.top_k, observer.outputs
    return None, seen


def _run_source(block: RunnableBlock, layer: StreamedLayer, inputs: Call) -> Any:
    """Runs a layer with its block in the source."""
    return run_routed(layer, block, inputs)
