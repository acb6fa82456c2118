"""What is observed of one MoE block while its layer runs over the calibration set."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from accelerate.utils import send_to_device
from torch import Tensor, nn

from hcsmoe_hub.model.router import router_weight, watch_logits
from hcsmoe_hub.observation.observers import CalibrationObserver, mean_outputs
from hcsmoe_hub.observation.overflow import are_finite, not_finite
from hcsmoe_hub.observation.runnable_block import RunnableBlock
from hcsmoe_hub.observation.statistics import Call, ExpertStatistics, LayerStatistics, sample_tokens


@dataclass(slots=True, kw_only=True)
class Observation:
    """One MoE layer after it has run over the calibration set.

    Attributes:
        statistics: What every method works on.
        calls: Inputs of its block.
        top_k: Choices of its router, one ``[T, K]`` int16 tensor per call; -1 for none.
        outputs: Its routed outputs, one ``[T, H]`` tensor per call.
        domains: Domain of each of the equally long sequences that the tokens of all calls come from, in their order.
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
        feature_tokens: Tokens to keep of its inputs.
        seed: Of the choice of those tokens.
        domains: Domain of each sequence.
        with_outputs: Whether to run every expert on every token for its mean output.
        with_gram: Whether to accumulate the products of the experts' router-weighted outputs.
    """

    def __init__(
        self,
        block: RunnableBlock,
        *,
        feature_tokens: int,
        seed: int,
        domains: Sequence[str],
        with_outputs: bool = True,
        with_gram: bool = False,
    ) -> None:
        self._block = block
        self._feature_tokens = feature_tokens
        self._seed = seed
        self._domains = domains
        self._with_outputs = with_outputs
        self._with_gram = with_gram
        self._observer = self._fresh_observer()
        self._calls: list[Call] = []
        self._inputs: list[Tensor] = []

    def _fresh_observer(self) -> CalibrationObserver:
        statistics = ExpertStatistics.empty(self._block.experts.num_experts, with_gram=self._with_gram)
        return CalibrationObserver(statistics, with_outputs=self._with_outputs)

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
                stack.enter_context(remembering_calls(moe, self._calls))
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
            VerificationError: If the outputs of the experts are not finite; says whether weights are broken or values
                overflow.
        """
        sums, layer = self._observer.statistics, self._block.block.layer
        outputs_EH = mean_outputs(self._block.experts, sums) if self._with_outputs else None
        if not self._is_sound(outputs_EH):
            skeleton = self._block.skeleton
            raise not_finite(
                f"layer {layer}: the outputs of its experts are",
                weights=skeleton.layers[layer].state_dict().values(),
                dtype=skeleton.dtype,
                inputs=self._inputs,
            )
        is_whole = self._block.block.is_whole_layer
        sample = None if is_whole else sample_tokens(self._calls, self._feature_tokens, self._seed)
        return Observation(
            statistics=LayerStatistics.of(sums, outputs_EH, sample),
            calls=self._calls,
            top_k=self._observer.top_k,
            outputs=self._observer.outputs,
            domains=self._domains,
        )

    def _is_sound(self, outputs_EH: Tensor | None) -> bool:
        """Whether the experts return finite numbers; those that did not run, whether their weights are finite."""
        if outputs_EH is not None:
            return bool(outputs_EH.isfinite().all())
        weights = self._block.experts.module.parameters()
        return all(are_finite(values) for values in (*self._observer.outputs, *weights))


@contextmanager
def remembering_calls(moe: nn.Module, calls: list[Call]) -> Iterator[None]:
    """Adds the inputs of every run of a block to ``calls``, on the CPU."""

    def remember(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(Call(send_to_device(args, "cpu"), send_to_device(kwargs, "cpu")))

    hook = moe.register_forward_pre_hook(remember, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
