"""Weights that a fit may write to."""

import torch
from torch import nn


def widen(module: nn.Module) -> nn.Module:
    """Gives a module float32 parameters and buffers in memory of their own, and returns it.

    On a CPU the tensors of a loaded block may be those of the result, or of the source: a fit that is dropped must
    leave no trace in them.
    """
    for values in (*module.parameters(), *module.buffers()):
        if values.is_floating_point():
            values.data = values.data.to(torch.float32, copy=True)
    return module
