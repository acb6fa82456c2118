"""What is observed of one MoE block while its layer runs over the calibration set."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hcsmoe_hub.machine import ranks
from hcsmoe_hub.machine.finite import are_finite
from hcsmoe_hub.model.router import router_weight, watch_logits
from hcsmoe_hub.observation.calibration_observer import CalibrationObserver, mean_outputs
from hcsmoe_hub.observation.overflow import broken_until, not_finite
from hcsmoe_hub.observation.runnable_block import RunnableBlock
from hcsmoe_hub.observation.statistics import Call, ExpertStatistics, LayerStatistics, sample_tokens
from hcsmoe_hub.observation.wanted import Wanted


@dataclass(slots=True, kw_only=True)
class Observation:
    """One MoE layer after it has run over the calibration set; tensors are on its device or on the host.

    Attributes:
        statistics: What every method works on.
        calls: Inputs of its block.
        top_k: Choices of its router, one ``[T, K]`` int16 tensor per call; -1 for none.
        outputs: Its routed outputs, one ``[T, H]`` tensor per call.
        domains: Domain of each of the equally long sequences that the tokens of the calls of all ranks come from, in
            their order.
    """

    statistics: LayerStatistics
    calls: list[Call]
    top_k: list[Tensor]
    outputs: list[Tensor]
    domains: Sequence[str]


class BlockWatcher:
    """Watches one MoE block of the source while its layer runs over the calibration set.

    Args:
        block: The block to watch.
        feature_tokens: Tokens of a sample of its inputs.
        seed: Of the choice of those tokens.
        domains: Domain of each sequence.
        wanted: What is observed besides what every report shows.
    """

    def __init__(
        self,
        block: RunnableBlock,
        *,
        feature_tokens: int,
        seed: int,
        domains: Sequence[str],
        wanted: Wanted,
    ) -> None:
        self._block = block
        self._feature_tokens = feature_tokens
        self._seed = seed
        self._domains = domains
        self._wanted = wanted
        self._observer = self._fresh_observer()
        self._calls: list[Call] = []
        self._inputs: list[Tensor] = []

    def _fresh_observer(self) -> CalibrationObserver:
        statistics = ExpertStatistics.empty(
            self._block.experts.num_experts, wanted=self._wanted, device=self._block.device
        )
        observer = CalibrationObserver(statistics)
        observer.keep = self._block.batcher.keep
        return observer

    @contextmanager
    def watching(self, inputs: Call) -> Iterator[None]:
        """Watches the block inside a ``with`` block.

        Args:
            inputs: Inputs of the layer, all sequences of them.
        """
        self._inputs = [value for value in inputs.args if isinstance(value, Tensor) and value.is_floating_point()]
        moe, skeleton = self._block.moe, self._block.skeleton
        weight = router_weight(self._block.block, skeleton.state)
        with ExitStack() as stack:
            if self._block.block.is_whole_layer:
                self._calls.append(inputs)
            else:
                stack.enter_context(remembering_calls(moe, self._calls, self._block.batcher.keep))
            if weight is not None:
                stack.callback(watch_logits(skeleton.module, weight, self._add_logits))
            stack.enter_context(self._block.experts.observing(moe, self._observer))
            yield

    def _add_logits(self, logits_TE: Tensor) -> None:
        self._observer.statistics.add_logits(logits_TE)

    def restart(self) -> None:
        """Forgets what was seen: the layer runs from its first sequence on, perhaps for the second time."""
        if not self._block.block.is_whole_layer:
            self._calls.clear()
        self._observer = self._fresh_observer()
        self._block.experts.observe(self._block.moe, self._observer)

    def observation(self) -> Observation:
        """What was seen, after the layer has run over all sequences.

        Raises:
            VerificationError: If the outputs of the experts are not finite; names the tensor if weights are broken, and
                says otherwise where values overflow.
        """
        sums, layer = self._observer.statistics, self._block.block.layer
        sums.finish()
        outputs_EH = mean_outputs(self._block.experts, sums) if self._wanted.outputs else None
        if not all(ranks.every(self._is_sound(outputs_EH))):
            skeleton = self._block.skeleton
            raise not_finite(
                f"layer {layer}: the outputs of its experts are",
                broken=broken_until(skeleton, layer),
                dtype=skeleton.dtype,
                inputs=self._inputs,
            )
        sample = None
        if self._wanted.sample and not self._block.block.is_whole_layer:
            sample = sample_tokens(self._calls, self._feature_tokens, self._seed)
        return Observation(
            statistics=LayerStatistics.of(sums, outputs_EH, sample),
            calls=self._calls,
            top_k=self._observer.top_k,
            outputs=self._observer.outputs,
            domains=self._domains,
        )

    def _is_sound(self, outputs_EH: Tensor | None) -> bool:
        """Whether the experts return finite numbers, on the tokens routed to them and in the mean over all."""
        return are_finite(*self._observer.outputs, *(() if outputs_EH is None else (outputs_EH,)))


@contextmanager
def remembering_calls(moe: nn.Module, calls: list[Call], keep: Callable[[Any], Any]) -> Iterator[None]:
    """Adds the inputs of every run of a block to ``calls``, where ``keep`` takes them."""

    def remember(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(Call(keep(args), keep(kwargs)))

    hook = moe.register_forward_pre_hook(remember, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
