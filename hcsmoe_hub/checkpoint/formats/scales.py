"""Scales: how they are stored, and how the publishers of each format compute them."""

import torch
from torch import Tensor

# Dtypes that hold nothing but a power of two: its exponent plus 127; 255 is not a number.
EXPONENTS = (torch.uint8, torch.float8_e8m0fnu)
EXPONENT_BIAS = 127


def scale_values(scales: Tensor) -> Tensor:
    """Stored scales to float32; bytes hold exponents."""
    return (scales.view(torch.float8_e8m0fnu) if scales.dtype == torch.uint8 else scales).float()


def divisors(scales: Tensor) -> Tensor:
    """What values are divided by to get codes: the scales in float32, but 1 where they are 0."""
    values = scale_values(scales)
    return torch.where(values == 0, 1, values)


def linear_scales(largest: Tensor, limit: float, dtype: torch.dtype) -> Tensor:
    """Scales that map the largest magnitude of each block to the largest code.

    Args:
        largest: Largest magnitude of every block, in float32.
        limit: The largest code.
        dtype: Dtype of the scales as stored.

    Returns:
        The scales; 1 for a block of zeros, and nowhere less than the smallest normal number of ``dtype``.
    """
    scales = (largest / limit).clamp_min(torch.finfo(dtype).tiny)
    return torch.where(largest > 0, scales, 1).to(dtype)


def power_scales(largest: Tensor, limit: float, dtype: torch.dtype) -> Tensor:
    """The smallest powers of two with which no value of a block exceeds the largest code.

    DeepSeek computes its power-of-two scales of FP8 like this, OpenAI those of MXFP4.

    Args:
        largest: Largest magnitude of every block, in float32.
        limit: The largest code.
        dtype: Dtype of the scales as stored; exponents in those that hold nothing else.

    Returns:
        The scales, from 2**-127 to 2**127; 1 for a block of zeros.
    """
    mantissa, exponent = torch.frexp(largest / limit)
    # frexp gives a mantissa from 0.5, which stands for a power of two itself, up to 1.
    power = torch.where(mantissa == 0.5, exponent - 1, exponent)
    power = torch.where(largest > 0, power, 0).clamp(-EXPONENT_BIAS, EXPONENT_BIAS)
    codes = (power + EXPONENT_BIAS).to(torch.uint8)
    if dtype == torch.uint8:
        return codes
    exponents = codes.view(torch.float8_e8m0fnu)
    return exponents if dtype == torch.float8_e8m0fnu else exponents.float().to(dtype)


def make_scales(largest: Tensor, limit: float, dtype: torch.dtype, *, powers: bool) -> Tensor:
    """Scales of every block: powers of two where asked for or where their dtype holds nothing else."""
    make = power_scales if powers or dtype in EXPONENTS else linear_scales
    return make(largest, limit, dtype)
