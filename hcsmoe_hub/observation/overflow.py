"""Tells numbers that overflow from weights that are broken: both make a model's outputs infinite or undefined."""

from collections.abc import Iterable

import torch
from torch import Tensor

from hcsmoe_hub.errors import VerificationError

BROKEN_WEIGHTS_HINT = "download the source again; 'hcsmoe verify SOURCE' names the first tensor that is not finite"


def are_finite(values: Tensor) -> bool:
    """Whether every number is finite; needs no memory for an answer per number."""
    return values.numel() == 0 or all(bool(bound.isfinite()) for bound in values.aminmax())


def overflow_in(dtype: torch.dtype) -> str:
    """What has happened to values that are too large for a dtype."""
    return f"values overflow in {_name(dtype)} (largest {torch.finfo(dtype).max:.5g})"


def overflow_hint(dtype: torch.dtype) -> str:
    """What to do about values that overflow in a dtype."""
    if dtype == torch.float16:
        return "convert the bfloat16 or float32 checkpoint of the same model"
    return "download the source again, and report this checkpoint if it stays that way"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def not_finite(
    subject: str, *, weights: Iterable[Tensor], dtype: torch.dtype, inputs: Iterable[Tensor] = ()
) -> VerificationError:
    """Explains numbers that are not finite.

    Args:
        subject: Which numbers, with their verb: ``layer 3: the outputs of its experts are``.
        weights: The source's weights that they are computed with.
        dtype: What they are computed in.
        inputs: The hidden states that they are computed from.

    Returns:
        The error to raise: broken weights, an overflow here, or what an earlier layer has passed on.
    """
    if not all(are_finite(weight) for weight in weights if weight.is_floating_point()):
        return VerificationError(f"{subject} not finite: the source holds broken weights.", hint=BROKEN_WEIGHTS_HINT)
    beginning = f"{subject} not finite, although the source's weights in this layer are: "
    overflow = overflow_in(dtype)
    if all(are_finite(values) for values in inputs):
        return VerificationError(f"{beginning}{overflow}.", hint=overflow_hint(dtype))
    if dtype == torch.float16:
        return VerificationError(
            f"{beginning}hidden states of an earlier layer have overflowed, as {overflow}, unless its weights are "
            "broken.",
            hint=f"{overflow_hint(dtype)}; 'hcsmoe verify SOURCE' names a broken tensor if there is one",
        )
    return VerificationError(f"{beginning}an earlier layer holds broken weights.", hint=BROKEN_WEIGHTS_HINT)
