"""Bytes of the largest decoder layer of a plan, and the numbers that estimates of memory and arithmetic share."""

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean

from hcsmoe_hub.calibration.measured import MEASURED_TOKENS, MOST_DOMAINS
from hcsmoe_hub.model.width import neurons_of
from hcsmoe_hub.planning.conversion_plan import ConversionPlan


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes by place.

    Attributes:
        host: In the memory of the process.
        device: On the accelerator.
    """

    host: int = 0
    device: int = 0

    def __add__(self, other: "Memory") -> "Memory":
        return Memory(self.host + other.host, self.device + other.device)

    def __or__(self, other: "Memory") -> "Memory":
        """The greater of both in each place: the peak of two phases that follow each other."""
        return Memory(max(self.host, other.host), max(self.device, other.device))


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSizes:
    """Bytes in memory.

    Attributes:
        others: Of the largest decoder layer without its routed experts, in the dtype of the computation.
        experts: Of its routed experts, in the dtype that they are kept in.
        merged: Of the experts of the result, as they are written.
        reduced: Of the same experts where they run, beyond ``merged``; 0 where these are the same tensors.
        rest: Of everything outside the decoder layers.
        token: Of the hidden state of one token.
    """

    others: int
    experts: int
    merged: int
    reduced: int
    rest: int
    token: int

    @property
    def layer(self) -> int:
        """Bytes of the whole layer."""
        return self.others + self.experts


def layer_sizes(plan: ConversionPlan) -> LayerSizes:
    """Sizes of a plan's layers, from the shapes of both models."""
    model = plan.model
    state, itemsize = model.skeleton.state, model.skeleton.dtype.itemsize
    stored = min(itemsize, model.dtype.itemsize)
    experts = {block.layer: sum(state[tensor.name].numel() for tensor in block.experts) for block in model.blocks}
    groups = {
        layer: sum(state[name].numel() for name in set(group.targets.values())) for layer, group in model.groups.items()
    }
    layers = (
        ((size - experts.get(layer, 0)) * itemsize, experts.get(layer, 0) * stored)
        for layer, size in groups.items()
        if layer is not None
    )
    others, kept = max(layers, key=sum)
    merged = max(sum(plan.state[tensor.name].numel() for tensor in block.experts) for block in model.blocks)
    return LayerSizes(
        others=others,
        experts=kept,
        merged=merged * model.dtype.itemsize,
        reduced=merged * itemsize if itemsize != model.dtype.itemsize else 0,
        rest=groups.get(None, 0) * itemsize,
        token=model.skeleton.text_config.hidden_size * itemsize,
    )


def at_work(plan: ConversionPlan, nbytes: int) -> Memory:
    """Bytes where the layers run."""
    return Memory(device=nbytes) if plan.on_device else Memory(host=nbytes)


def kept_parameters(plan: ConversionPlan) -> int:
    """Parameters of all routed experts of the result, those of layouts with N copies counted once."""
    before = plan.model.settings.experts * neurons_of(plan.model)
    return plan.model.expert_parameters() * plan.experts * plan.width // before


def expert_parameters(plan: ConversionPlan) -> int:
    """Parameters of one expert."""
    return plan.model.expert_parameters() // (plan.model.settings.experts * len(plan.model.blocks))


def matrices(plan: ConversionPlan) -> int:
    """Matrices of one expert: a gate, an up and a down projection, or no gate."""
    hidden = plan.model.skeleton.text_config.hidden_size
    # Biases are a small part of one more.
    return max(2, expert_parameters(plan) // (hidden * neurons_of(plan.model)))


def token_share(plan: ConversionPlan, layers: Iterable[int]) -> float:
    """Share of the tokens of a sequence that run through a layer, on average over some layers.

    Args:
        plan: The conversion.
        layers: Numbers of the layers; those of an encoder see the source alone, and those behind them the rest.
    """
    length, source = plan.calibration.sequence_length, plan.calibration.source_length
    if not source:
        return 1.0
    depth = plan.model.skeleton.encoder_depth
    return fmean((source if layer < depth else length - source) / length for layer in layers)


def attended_tokens(plan: ConversionPlan) -> float:
    """Tokens that each token of a sequence attends to, over all layers; a decoder also attends to the source."""
    length, source = plan.calibration.sequence_length, plan.calibration.source_length
    skeleton = plan.model.skeleton
    if not source:
        return float(length * skeleton.depth)
    target, encoder = length - source, skeleton.encoder_depth
    return (encoder * source * source + (skeleton.depth - encoder) * target * length) / length


def measured_tokens(plan: ConversionPlan) -> int:
    """Most tokens that the cost of a conversion is measured on."""
    has_text = plan.statistics is None or plan.statistics.has_text
    is_measured = plan.options.measure and has_text and not plan.calibration.is_token_ids
    # A sequence of every domain, though how many there are shows only when the text is read.
    most = max(MEASURED_TOKENS, MOST_DOMAINS * plan.calibration.sequence_length)
    return min(most, plan.calibration.tokens) if is_measured else 0
