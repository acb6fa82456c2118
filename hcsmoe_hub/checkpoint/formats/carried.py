"""Stored tensors that belong to a weight but say nothing about its values: static scales of its inputs."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class CarriedPart:
    """A part that is copied, never computed.

    Attributes:
        role: What it is called among the parts.
        key: Its stored key, made from those of the weight; see ``stored_key``.
        dtype: Dtype as stored.
        shape: Shape as stored; without its first dimension if that counts the experts of a fused weight.
        is_per_expert: Whether it does.
    """

    role: str
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    is_per_expert: bool

    def full_shape(self, weight: tuple[int, ...]) -> tuple[int, ...]:
        """Its shape next to a weight of some shape."""
        return (weight[0], *self.shape) if self.is_per_expert else self.shape


def stored_key(template: str, name: str) -> str:
    """Key of a part.

    Args:
        template: ``{name}`` in it is the key of the weight, ``{module}`` that key up to its last dot.
        name: Key of the weight.
    """
    return template.format(name=name, module=name[: name.rfind(".") + 1])
