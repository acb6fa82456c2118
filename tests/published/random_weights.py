"""Random weights in every format that published checkpoints are stored in, of a size that keeps tiny models apart."""

import torch
from torch import Tensor

from published.collector import Shape, TensorSpec, is_scale
from published.sizes import EXPERTS, TOP_K

FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
SPREAD = 0.15


def random_tensor(name: str, spec: TensorSpec, generator: torch.Generator) -> Tensor:
    """A tensor of random weights.

    Args:
        name: Of the tensor: scales, norms and tables from tokens to experts have values of their own kind.
        spec: Its dtype and shape.
        generator: Source of the numbers.
    """
    if spec.dtype in FLOATS:
        return _floats(name, spec, generator).to(FLOATS[spec.dtype])
    if spec.dtype == "I64":
        # A table: each row names different experts.
        return torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(spec.shape[0])])
    if spec.dtype == "F8_E4M3":
        return _normal(spec.shape, generator).mul(64).to(torch.float8_e4m3fn)
    if spec.dtype == "F8_E8M0":
        return torch.exp2(torch.randint(-10, -7, spec.shape, generator=generator).float()).to(torch.float8_e8m0fnu)
    if spec.dtype == "U8" and is_scale(name, spec):
        # Exponents of two, of which 127 stands for one.
        return torch.randint(122, 126, spec.shape, generator=generator, dtype=torch.uint8)
    if spec.dtype in ("U8", "I8"):
        nibbles = torch.randint(0, 256, spec.shape, generator=generator, dtype=torch.uint8)
        return nibbles if spec.dtype == "U8" else nibbles.view(torch.int8)
    assert spec.dtype == "I32", f"no random weights are made as {spec.dtype}"
    return torch.randint(-(2**31), 2**31, spec.shape, generator=generator, dtype=torch.int32)


def _normal(shape: Shape, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


def _floats(name: str, spec: TensorSpec, generator: torch.Generator) -> Tensor:
    values = _normal(spec.shape, generator)
    if name.endswith("activation_scale"):
        return values.abs().add(0.5) / 64
    if is_scale(name, spec):
        return values.abs().add(0.5) * (SPREAD / 64)
    if name.endswith(("A_log", "layer_scalar", "router.scale", "per_expert_scale")) or _is_norm(name, spec):
        return values * 0.1 + 1
    return values * SPREAD


def _is_norm(name: str, spec: TensorSpec) -> bool:
    return len(spec.shape) == 1 and "norm" in name and name.endswith("weight")
