"""What happens to one layer while it is in memory: observe, cluster, merge, route, measure, write."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from hcsmoe_hub.calibration.statistics import ExpertStatistics
from hcsmoe_hub.checkpoint.layers import free, move_computed_buffers
from hcsmoe_hub.checkpoint.microbatch import MicroBatcher
from hcsmoe_hub.checkpoint.writer import ShardWriter
from hcsmoe_hub.clustering import Clusters, hierarchical, pairwise_distances
from hcsmoe_hub.errors import VerificationError
from hcsmoe_hub.events import Listener, Stage, StageAdvanced, Warned
from hcsmoe_hub.memory import return_freed_memory
from hcsmoe_hub.merging import member_weights, merge_rows
from hcsmoe_hub.moe.blocks import MoEBlock
from hcsmoe_hub.moe.experts import PROBE, experts_of, observe, register_probe, stop_observing
from hcsmoe_hub.moe.observer import CalibrationObserver, RoutedObserver, mean_outputs
from hcsmoe_hub.options import MethodOptions
from hcsmoe_hub.plan import ConversionPlan
from hcsmoe_hub.report import LayerReport, RouterReport
from hcsmoe_hub.routing import reduce_rows, remap_experts, top_k_agreement
from hcsmoe_hub.streaming import Visitor

BROKEN_WEIGHTS_HINT = "download the source again; 'hcsmoe verify SOURCE' names the first tensor that is not finite"
Call = tuple[tuple[Any, ...], Mapping[str, Any]]


def cluster_experts(features_EH: Tensor, experts: int, method: MethodOptions) -> Clusters:
    """Groups the experts of one layer by their features."""
    return hierarchical(pairwise_distances(features_EH, method.distance), experts, method.linkage)


@dataclass(slots=True)
class _Observation:
    """What is remembered of the layer at work.

    Attributes:
        observer: Statistics, routing and routed outputs.
        calls: Inputs of its MoE block, one entry per micro-batch.
    """

    observer: CalibrationObserver
    calls: list[Call] = field(default_factory=list)


class LayerReducer(Visitor):
    """Turns every layer's N experts into K as it passes, and writes the result.

    Attributes:
        reports: One report per MoE layer, in order.
    """

    def __init__(self, plan: ConversionPlan, writer: ShardWriter, batcher: MicroBatcher, emit: Listener) -> None:
        self.reports: list[LayerReport] = []
        self._plan = plan
        self._writer = writer
        self._batcher = batcher
        self._emit = emit
        self._blocks = {block.layer: block for block in plan.model.blocks}
        self._planned = plan.layout.tensors
        self._seen: _Observation | None = None
        register_probe()
        for skeleton in (plan.model.skeleton, plan.reduced):
            if skeleton.model._can_set_experts_implementation():
                skeleton.model.set_experts_implementation(PROBE)

    def enter(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        block = self._blocks.get(layer)
        if block is None:
            return
        self._seen = _Observation(CalibrationObserver(ExpertStatistics.empty(self._plan.model.settings.experts)))
        moe = self._plan.model.skeleton.model.get_submodule(block.path)
        if moe is module:
            # Router and experts hang on the decoder layer itself, so the block's input is the layer's.
            self._seen.calls.append((args, kwargs))
        else:
            moe.register_forward_pre_hook(self._remember_call, with_kwargs=True)

    def _remember_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert self._seen is not None
        self._seen.calls.append((send_to_device(args, "cpu"), send_to_device(kwargs, "cpu")))

    def start(self, layer: int) -> None:
        block = self._blocks.get(layer)
        if block is None:
            return
        assert self._seen is not None
        if not self._is_whole_layer(block):
            self._seen.calls.clear()
        self._seen.observer = CalibrationObserver(ExpertStatistics.empty(self._plan.model.settings.experts))
        model = self._plan.model.skeleton.model
        observe(model.get_submodule(block.path), model.get_submodule(block.experts_path), self._seen.observer)

    def _is_whole_layer(self, block: MoEBlock) -> bool:
        return block.path == f"{self._plan.model.skeleton.layers_name}.{block.layer}"

    def leave(self, layer: int | None, module: nn.Module, originals: Mapping[str, Tensor]) -> None:
        changed: dict[str, Tensor] = {}
        block = None if layer is None else self._blocks.get(layer)
        if block is not None:
            changed = self._reduce(block, originals)
        self._write(layer, changed)
        if layer is not None:
            self._emit(StageAdvanced(Stage.CONVERT, f"layer {layer}", self._writer.bytes_written))

    def _reduce(self, block: MoEBlock, originals: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Clusters and merges one block; returns its changed tensors by parameter name."""
        assert self._seen is not None
        seen, self._seen = self._seen, None
        method, model = self._plan.options.method, self._plan.model.skeleton.model
        stop_observing(model.get_submodule(block.path), model.get_submodule(block.experts_path))
        experts = experts_of(model.get_submodule(block.experts_path))
        statistics = seen.observer.statistics
        outputs_EH = mean_outputs(experts, statistics)
        if not outputs_EH.isfinite().all():
            raise VerificationError(
                f"layer {block.layer}: the outputs of its experts are not finite: the source holds broken weights.",
                hint=BROKEN_WEIGHTS_HINT,
            )
        clusters = cluster_experts(outputs_EH, self._plan.settings.experts, method)
        usage_E = statistics.usage_E.tolist()
        self._warn(block, clusters, usage_E)
        share_E = member_weights(clusters, usage_E, method.merge)
        state = {name: tensor for name, tensor in model.state_dict().items() if name in block.edited} | dict(originals)
        changed = {}
        for tensor in block.experts:
            rows_E, extra = tensor.split(state[tensor.name])
            changed[tensor.name] = tensor.join(merge_rows(rows_E, clusters, share_E), extra)
        for tensor in block.router:
            rows_E, extra = tensor.split(state[tensor.name])
            changed[tensor.name] = tensor.join(reduce_rows(rows_E, clusters, usage_E, method.router), extra)
        for name, result in changed.items():
            if not all(bound.isfinite() for bound in result.aminmax()):
                raise VerificationError(
                    f"{name} is not finite: the source holds broken weights.", hint=BROKEN_WEIGHTS_HINT
                )
        for name in block.tables:
            changed[name] = remap_experts(state[name], clusters)
        agreement, error = self._measure(block, changed, clusters, seen)
        self.reports.append(
            LayerReport(
                layer=block.layer,
                labels=list(clusters.labels),
                dominant=list(clusters.dominant(usage_E)),
                usage=usage_E,
                saliency=statistics.saliency().tolist(),
                merge_heights=list(clusters.heights),
                router=RouterReport(policy=method.router.value, top_k_agreement=agreement),
                output_error=error,
            )
        )
        # The source's experts are not needed any more; writing briefly holds parts of the merged ones twice.
        free(model.get_submodule(block.experts_path))
        return_freed_memory()
        return changed

    def _warn(self, block: MoEBlock, clusters: Clusters, usage_E: list[int]) -> None:
        for members in clusters.members:
            if len(members) > 1 and not any(usage_E[expert] for expert in members):
                names = ", ".join(map(str, members))
                text = f"layer {block.layer}: no calibration token reached experts {names}; merged equally."
                self._emit(Warned(text))

    def _measure(
        self, block: MoEBlock, changed: Mapping[str, Tensor], clusters: Clusters, seen: _Observation
    ) -> tuple[float, float]:
        """Runs the reduced block on the calibration tokens.

        Returns:
            Top-k agreement, and ``||new - old|| / ||old||`` of the routed outputs over all tokens.
        """
        source, reduced = self._plan.model.skeleton.model, self._plan.reduced.model
        moe, device = reduced.get_submodule(block.path), self._batcher.device
        prefix = f"{block.path}."
        current = source.get_submodule(block.path).state_dict(prefix=prefix)
        new = {name: changed[name].to(tensor.dtype) if name in changed else tensor for name, tensor in current.items()}
        moe.load_state_dict({name.removeprefix(prefix): tensor.to(device) for name, tensor in new.items()}, assign=True)
        move_computed_buffers(moe, device)
        observers: list[RoutedObserver] = []

        def start() -> None:
            observers[:] = [RoutedObserver()]
            observe(moe, reduced.get_submodule(block.experts_path), observers[0])

        start()
        with torch.no_grad():
            for args, kwargs in seen.calls:
                if self._is_whole_layer(block):
                    self._batcher.wrap(moe.forward, start)(*args, **kwargs)
                else:
                    moe(*send_to_device(args, device), **send_to_device(kwargs, device))
        stop_observing(moe, reduced.get_submodule(block.experts_path))
        free(moe)
        agreement = top_k_agreement(torch.cat(seen.observer.top_k), torch.cat(observers[0].top_k), clusters)
        return agreement, relative_error(seen.observer.outputs, observers[0].outputs)

    def _write(self, layer: int | None, changed: Mapping[str, Tensor]) -> None:
        """Writes what this group does not simply copy, under the names of the source."""
        names = self._plan.account.rewritten.get(layer)
        if not names:
            return
        state = self._plan.model.skeleton.model.state_dict()
        tensors = {name: changed.get(name, state[name]) for name in names}
        conversions = self._plan.model.groups[layer].conversions
        for name, tensor in self._plan.reduced.to_stored(tensors, conversions).items():
            self._writer.write(name, tensor.to(self._planned[name].dtype))


def relative_error(old: list[Tensor], new: list[Tensor]) -> float:
    """``||new - old|| / ||old||`` over lists of equal tensors, summed in float64; 0 if both are zero."""
    difference = sum(_squared_norm(b.float() - a.float()) for a, b in zip(old, new, strict=True))
    size = sum(_squared_norm(a.float()) for a in old)
    return (difference / size) ** 0.5 if size else 0.0


def _squared_norm(values: Tensor) -> float:
    return float(values.square().sum(dtype=torch.float64))
