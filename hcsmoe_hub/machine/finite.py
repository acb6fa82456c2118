"""Whether numbers are finite, at the speed of memory."""

import torch
from torch import Tensor


def are_finite(*tensors: Tensor) -> bool:
    """Whether every number is finite; needs no memory for an answer per number, and waits once for each device.

    Args:
        tensors: Of any dtype; integers are always finite.
    """
    found: dict[torch.device, list[Tensor]] = {}
    for values in tensors:
        if values.numel() and values.is_floating_point():
            # torch cannot compare numbers of eight bits.
            wide = values.bfloat16() if values.itemsize == 1 else values
            found.setdefault(values.device, []).extend(bound.isfinite() for bound in wide.aminmax())
    return all(bool(torch.stack(answers).all()) for answers in found.values())
