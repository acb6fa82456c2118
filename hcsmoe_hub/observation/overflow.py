"""Distinguishes numbers that overflow from broken weights: both make the outputs of a model infinite or undefined."""

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor

from hcsmoe_hub.errors import VerificationError
from hcsmoe_hub.machine.finite import are_finite
from hcsmoe_hub.model.skeleton import Broken, Skeleton

BROKEN_WEIGHTS_HINT = "download the source again; where it stays that way, report it to its publisher"


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


def broken_until(skeleton: Skeleton, layer: int) -> list[Broken]:
    """The broken tensors of a source that the numbers of a decoder layer depend on, those of the layer itself first.

    Args:
        skeleton: The source; this layer, those before it and what lies outside of them have been loaded.
        layer: Index of the decoder layer.
    """
    # The next layer may be loaded already.
    found = [each for each in skeleton.broken.values() if each.layer is None or each.layer <= layer]
    return sorted(found, key=lambda each: each.layer != layer)


def check_weights(skeleton: Skeleton, layer: int, parameters: Collection[str]) -> None:
    """Checks that the source's tensors behind some parameters of a layer are finite.

    Args:
        skeleton: The source; the layer has been loaded.
        layer: Index of the decoder layer.
        parameters: Names of the parameters.

    Raises:
        VerificationError: For the first one that is not; names layer and tensor.
    """
    for broken in broken_until(skeleton, layer):
        if broken.layer == layer and broken.parameter in parameters:
            raise _broken(f"layer {layer}: its weights are not finite", broken)


def check_result(layer: int, tensors: Mapping[str, Tensor]) -> None:
    """Checks that all tensors of a block of the result are finite.

    Args:
        layer: Index of the decoder layer.
        tensors: The tensors, by name.

    Raises:
        VerificationError: For the first one that is not; names layer and tensor.
    """
    if are_finite(*tensors.values()):
        return
    name, values = next((name, values) for name, values in tensors.items() if not are_finite(values))
    raise not_finite(f"layer {layer}: {name} is", dtype=values.dtype)


def not_finite(
    subject: str, *, broken: Iterable[Broken] = (), dtype: torch.dtype, inputs: Iterable[Tensor] = ()
) -> VerificationError:
    """Explains numbers that are not finite.

    Args:
        subject: Which numbers, with their verb: ``layer 3: the outputs of its experts are``.
        broken: Tensors of the source that the numbers depend on and that are not finite themselves.
        dtype: What they are computed in.
        inputs: The hidden states that they are computed from.

    Returns:
        The error to raise: broken weights, an overflow here, or one in an earlier layer.
    """
    for each in broken:
        return _broken(f"{subject} not finite", each)
    beginning = f"{subject} not finite, although the source's weights up to here are: "
    overflow = overflow_in(dtype)
    if not are_finite(*inputs):
        overflow = f"hidden states of an earlier layer have overflowed, as {overflow}"
    return VerificationError(f"{beginning}{overflow}.", hint=overflow_hint(dtype))


def _broken(beginning: str, broken: Broken) -> VerificationError:
    return VerificationError(
        f"{beginning}: the source's tensor {broken.name!r} holds NaN or infinite numbers.", hint=BROKEN_WEIGHTS_HINT
    )
