"""What is seen of one decoder layer while the calibration set passes it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hcsmoe_hub.errors import VerificationError
from hcsmoe_hub.model.blocks import MoEBlock
from hcsmoe_hub.model.experts import experts_of, observe, stop_observing
from hcsmoe_hub.model.microbatch import MicroBatcher
from hcsmoe_hub.model.router import router_weight, watch_logits
from hcsmoe_hub.model.source_model import SourceModel
from hcsmoe_hub.observation.observers import CalibrationObserver, RoutedObserver, mean_outputs
from hcsmoe_hub.observation.statistics import Call, ExpertStatistics, LayerStatistics, sample_tokens

BROKEN_WEIGHTS_HINT = "download the source again; 'hcsmoe verify SOURCE' names the first tensor that is not finite"


@dataclass(slots=True, kw_only=True)
class Observation:
    """One MoE layer after the calibration set has passed it.

    Attributes:
        statistics: What every method works on.
        calls: Inputs of its block.
        top_k: Choices of its router, one ``[T, K]`` int16 tensor per call; -1 for none.
        outputs: Its routed outputs, one ``[T, H]`` tensor per call.
    """

    statistics: LayerStatistics
    calls: list[Call]
    top_k: list[Tensor]
    outputs: list[Tensor]


class BlockWatcher:
    """Watches one MoE block from its first micro-batch to its last.

    Args:
        model: The source.
        block: The block to watch.
        feature_tokens: Tokens to keep of its inputs.
        seed: Of the choice of those tokens.
    """

    def __init__(self, model: SourceModel, block: MoEBlock, *, feature_tokens: int, seed: int) -> None:
        self._model = model
        self._block = block
        self._feature_tokens = feature_tokens
        self._seed = seed
        self._moe = model.skeleton.module.get_submodule(block.path)
        self._experts = model.skeleton.module.get_submodule(block.experts_path)
        self._observer = self._fresh_observer()
        self._calls: list[Call] = []
        self._stop_logits: Callable[[], None] = lambda: None
        self._hook: RemovableHandle | None = None

    def _fresh_observer(self) -> CalibrationObserver:
        return CalibrationObserver(ExpertStatistics.empty(self._model.settings.experts))

    def enter(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The layer is about to run over all sequences."""
        if self._model.is_whole_layer(self._block):
            self._calls.append(Call(args, kwargs))
        else:
            self._hook = self._moe.register_forward_pre_hook(self._remember_call, with_kwargs=True)
        weight = router_weight(self._block, self._model.skeleton.state)
        if weight is not None:
            self._stop_logits = watch_logits(self._model.skeleton.module, weight, self._add_logits)

    def _remember_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._calls.append(Call(send_to_device(args, "cpu"), send_to_device(kwargs, "cpu")))

    def _add_logits(self, logits_TE: Tensor) -> None:
        self._observer.statistics.add_logits(logits_TE)

    def start(self) -> None:
        """The layer runs from the first sequence on; what an earlier attempt left behind is void."""
        if not self._model.is_whole_layer(self._block):
            self._calls.clear()
        self._observer = self._fresh_observer()
        observe(self._moe, self._experts, self._observer)

    def finish(self) -> Observation:
        """The layer has run over all sequences.

        Raises:
            VerificationError: If the outputs of its experts are not finite.
        """
        stop_observing(self._moe, self._experts)
        self._stop_logits()
        if self._hook is not None:
            self._hook.remove()
        sums = self._observer.statistics
        outputs_EH = mean_outputs(experts_of(self._experts), sums)
        if not outputs_EH.isfinite().all():
            raise VerificationError(
                f"layer {self._block.layer}: the outputs of its experts are not finite: the source holds broken "
                "weights.",
                hint=BROKEN_WEIGHTS_HINT,
            )
        whole = self._model.is_whole_layer(self._block)
        sample = None if whole else sample_tokens(self._calls, self._feature_tokens, self._seed)
        return Observation(
            statistics=LayerStatistics.of(sums, outputs_EH, sample),
            calls=self._calls,
            top_k=self._observer.top_k,
            outputs=self._observer.outputs,
        )


def rerun(
    moe: nn.Module,
    experts: nn.Module,
    calls: list[Call],
    make_observer: Callable[[], RoutedObserver],
    *,
    batcher: MicroBatcher,
    whole_layer: bool,
) -> RoutedObserver:
    """Runs an MoE block once more on inputs that it, or the block it stands for, has seen.

    Args:
        moe: The block, its weights in memory.
        experts: Its experts module.
        calls: Its inputs.
        make_observer: Makes the observer that everything goes through; called once per attempt.
        batcher: Cuts a whole layer's sequences into micro-batches, and knows the device.
        whole_layer: Whether the block is the decoder layer itself.

    Returns:
        The observer of the attempt that went through.
    """
    observers: list[RoutedObserver] = []

    def start() -> None:
        observers[:] = [make_observer()]
        observe(moe, experts, observers[0])

    start()
    try:
        with torch.no_grad():
            for call in calls:
                if whole_layer:
                    # The layer's own forward: the one on the instance may load and free its weights.
                    batcher.wrap(partial(type(moe).forward, moe), start)(*call.args, **call.kwargs)
                else:
                    moe(*send_to_device(call.args, batcher.device), **send_to_device(call.kwargs, batcher.device))
    finally:
        stop_observing(moe, experts)
    return observers[0]
