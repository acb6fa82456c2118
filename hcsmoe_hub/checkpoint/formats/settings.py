"""What a raw config says about how weights are quantised."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch

_PLACES = ("quantization_config", "compression_config", "quantization")


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationSettings:
    """The parts of a quantisation config that are needed to read weights; nothing where there is none.

    Attributes:
        method: Its ``quant_method``, in lower case; ``mlx`` for the settings that MLX writes; empty if unknown.
        raw: The settings as they are.
        dtype: Dtype that the unquantised model would have.
    """

    method: str
    raw: Mapping[str, Any]
    dtype: torch.dtype

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """Reads a raw config, or the ``text_config`` inside it."""
        text = config.get("text_config")
        configs = [config, text] if isinstance(text, Mapping) else [config]
        found = [settings for outer in configs for name in _PLACES if (settings := _as_mapping(outer.get(name)))]
        raw = found[0] if found else {}
        named = {str(outer.get(key)) for outer in configs for key in ("dtype", "torch_dtype")}
        # MLX repositories repeat their settings under the usual name, without naming a method.
        is_mlx = "quant_method" not in raw and "group_size" in raw and "bits" in raw
        return cls(
            method="mlx" if is_mlx else str(raw.get("quant_method", "")).lower().replace("_", "-"),
            raw=raw,
            dtype=torch.float16 if "float16" in named and "bfloat16" not in named else torch.bfloat16,
        )

    @property
    def block_sizes(self) -> tuple[list[int], list[int]]:
        """Sizes of blocks that the settings name, for rows and for columns."""
        pairs = [self.raw.get("weight_block_size"), *(weights.get("block_structure") for weights in self.weights())]
        valid = [pair for pair in pairs if isinstance(pair, list | tuple) and len(pair) == 2]
        groups = [size for weights in self.weights() if isinstance(size := weights.get("group_size"), int)]
        rows = [int(pair[0]) for pair in valid if isinstance(pair[0], int)]
        return rows, [int(pair[1]) for pair in valid if isinstance(pair[1], int)] + groups

    @property
    def powers(self) -> bool:
        """Whether scales are powers of two in any dtype."""
        return self.raw.get("scale_fmt") == "ue8m0"

    @property
    def formats(self) -> set[str]:
        """The formats of compressed-tensors that are in use."""
        named = {self.raw.get("format"), *(group.get("format") for group in self._groups())}
        return {str(name) for name in named if name and name != "mixed-precision"}

    def weights(self) -> Iterator[Mapping[str, Any]]:
        """How compressed-tensors quantises weights, one for every group of layers."""
        for group in self._groups():
            yield _as_mapping(group.get("weights"))

    def _groups(self) -> Iterator[Mapping[str, Any]]:
        for group in _as_mapping(self.raw.get("config_groups")).values():
            yield _as_mapping(group)


def _as_mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
