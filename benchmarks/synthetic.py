"""Checkpoints with random weights for benchmarks of time and memory, where only sizes matter."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

# The calibration set of a checkpoint, as token ids.
IDS_FILE = "ids.npy"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a model in bfloat16.

    Attributes:
        family: ``mixtral`` or ``qwen2_moe``, whose layers also have a shared expert as wide as four routed ones.
        width: Neurons of a routed expert.
        active: Experts that a token chooses.
    """

    family: str
    hidden: int
    width: int
    layers: int
    experts: int
    active: int
    heads: int = 16
    vocabulary: int = 1024

    def config(self) -> dict[str, Any]:
        """``config.json``."""
        shared = {
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads // 2,
            "num_experts_per_tok": self.active,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 4096,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }
        if self.family == "mixtral":
            own = {"intermediate_size": self.width, "num_local_experts": self.experts}
            return shared | own | {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
        own = {"moe_intermediate_size": self.width, "num_experts": self.experts, "decoder_sparse_step": 1}
        own |= {"intermediate_size": 4 * self.width, "shared_expert_intermediate_size": 4 * self.width}
        return shared | own | {"model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"]}

    def layer(self, number: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors of one decoder layer, by name."""
        prefix, size = f"model.layers.{number}.", self.hidden
        is_mixtral = self.family == "mixtral"
        shapes: dict[str, tuple[int, ...]] = {f"{prefix}self_attn.o_proj.weight": (size, size)}
        for name, rows in (("q", size), ("k", size // 2), ("v", size // 2)):
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = (rows, size)
            if not is_mixtral:
                shapes[f"{prefix}self_attn.{name}_proj.bias"] = (rows,)
        shapes |= {f"{prefix}{name}_layernorm.weight": (size,) for name in ("input", "post_attention")}
        block = f"{prefix}{'block_sparse_moe' if is_mixtral else 'mlp'}."
        shapes[f"{block}gate.weight"] = (self.experts, size)
        names = ("w1", "w3", "w2") if is_mixtral else ("gate_proj", "up_proj", "down_proj")
        for expert in range(self.experts):
            shapes |= _mlp(f"{block}experts.{expert}.", names, size, self.width)
        if not is_mixtral:
            shapes |= _mlp(f"{block}shared_expert.", names, size, 4 * self.width)
            shapes[f"{block}shared_expert_gate.weight"] = (1, size)
        return shapes

    def outside(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors outside the layers, by name."""
        table = (self.vocabulary, self.hidden)
        return {"model.embed_tokens.weight": table, "lm_head.weight": table, "model.norm.weight": (self.hidden,)}


def _mlp(prefix: str, names: tuple[str, str, str], size: int, width: int) -> dict[str, tuple[int, ...]]:
    gate, up, down = names
    return {
        f"{prefix}{gate}.weight": (width, size),
        f"{prefix}{up}.weight": (width, size),
        f"{prefix}{down}.weight": (size, width),
    }


def write_checkpoint(folder: Path, shape: Shape, *, sequences: int, length: int) -> int:
    """Writes a checkpoint with one shard per layer, and token ids to convert it with.

    Args:
        folder: An empty folder.
        shape: Sizes of the model.
        sequences: Calibration sequences.
        length: Tokens of each.

    Returns:
        Bytes of the weights.
    """
    (folder / "config.json").write_text(json.dumps(shape.config()))
    generator = torch.Generator().manual_seed(0)
    parts = [*(shape.layer(number) for number in range(shape.layers)), shape.outside()]
    weight_map, size = {}, 0
    for number, shapes in enumerate(parts):
        shard = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        tensors = dict(_random(shapes, generator))
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
        size += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    np.save(folder / IDS_FILE, np.random.default_rng(0).integers(0, shape.vocabulary, (sequences, length)))
    return size


def _random(shapes: dict[str, tuple[int, ...]], generator: torch.Generator) -> Iterator[tuple[str, torch.Tensor]]:
    for name, shape in shapes.items():
        if len(shape) == 1:
            yield name, torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=torch.bfloat16)
        else:
            yield name, (torch.randn(shape, generator=generator) * 0.02).bfloat16()
