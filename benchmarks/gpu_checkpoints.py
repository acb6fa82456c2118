"""Random checkpoints whose experts come in families, drawn on the device and written layer by layer."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_run import Run
from safetensors.torch import save_file
from torch import Tensor

# Experts of a layer are noisy copies of so many.
FAMILIES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of a synthetic model.

    Attributes:
        kind: ``mixtral`` or ``qwen3_moe``.
        hidden: Hidden size.
        neurons: Neurons of an expert.
        experts: Experts of a layer.
        top_k: Active experts per token.
        heads: Heads of queries; of keys there are ``key_heads``.
        key_heads: Heads of keys and values.
        head: Numbers per head.
        vocabulary: Token ids.
        layers: Decoder layers.
        dtype: Of all weights.
    """

    kind: str
    hidden: int
    neurons: int
    experts: int
    top_k: int
    heads: int = 32
    key_heads: int = 8
    head: int = 128
    vocabulary: int = 4096
    layers: int = 2
    dtype: torch.dtype = torch.bfloat16

    @property
    def is_mixtral(self) -> bool:
        """Whether names and config are those of Mixtral."""
        return self.kind == "mixtral"

    def config(self) -> dict[str, Any]:
        """``config.json``."""
        common = {
            "architectures": ["MixtralForCausalLM" if self.is_mixtral else "Qwen3MoeForCausalLM"],
            "model_type": self.kind,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_heads,
            "head_dim": self.head,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": False,
            "torch_dtype": str(self.dtype).removeprefix("torch."),
            "num_experts_per_tok": self.top_k,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        if self.is_mixtral:
            sizes = {"intermediate_size": self.neurons, "num_local_experts": self.experts, "sliding_window": None}
            return common | sizes
        return common | {
            "intermediate_size": 3 * self.neurons,
            "moe_intermediate_size": self.neurons,
            "num_experts": self.experts,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }


class _Weights:
    """Draws the tensors of a model."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self._shape = shape
        self._device = device
        self._generator = torch.Generator(device).manual_seed(0)

    def _draw(self, *size: int) -> Tensor:
        return torch.randn(*size, generator=self._generator, device=self._device)

    def _matrix(self, rows: int, columns: int, scale: float | None = None) -> Tensor:
        values = self._draw(rows, columns) * (columns**-0.5 if scale is None else scale)
        return values.to(self._shape.dtype).cpu()

    def _ones(self, size: int) -> Tensor:
        return torch.ones(size, dtype=self._shape.dtype)

    def layer(self, number: int) -> dict[str, Tensor]:
        """All tensors of a decoder layer."""
        shape, name = self._shape, f"model.layers.{number}"
        queries, keys = shape.heads * shape.head, shape.key_heads * shape.head
        found = {f"{name}.{norm}.weight": self._ones(shape.hidden) for norm in _NORMS}
        for part, rows, columns in (
            ("q", queries, shape.hidden),
            ("k", keys, shape.hidden),
            ("v", keys, shape.hidden),
            ("o", shape.hidden, queries),
        ):
            found[f"{name}.self_attn.{part}_proj.weight"] = self._matrix(rows, columns)
        if not shape.is_mixtral:
            found |= {f"{name}.self_attn.{part}_norm.weight": self._ones(shape.head) for part in "qk"}
        block = f"{name}.block_sparse_moe" if shape.is_mixtral else f"{name}.mlp"
        found[f"{block}.gate.weight"] = self._matrix(shape.experts, shape.hidden)
        return found | dict(self._experts(block))

    def _experts(self, block: str) -> Iterator[tuple[str, Tensor]]:
        shape = self._shape
        names = ("w1", "w3", "w2") if shape.is_mixtral else ("gate_proj", "up_proj", "down_proj")
        for part, name in enumerate(names):
            size = (shape.hidden, shape.neurons) if part == 2 else (shape.neurons, shape.hidden)
            families = [self._draw(*size) for _ in range(min(FAMILIES, shape.experts // 2))]
            for expert in range(shape.experts):
                mixed = families[expert % len(families)] + 0.5 * self._draw(*size)
                values = (mixed * (1.25 * size[1]) ** -0.5).to(shape.dtype)
                yield f"{block}.experts.{expert}.{name}.weight", values.cpu()

    def rest(self) -> dict[str, Tensor]:
        """Embeddings, the last norm and the head."""
        shape = self._shape
        return {
            "model.embed_tokens.weight": self._matrix(shape.vocabulary, shape.hidden, scale=1.0),
            "lm_head.weight": self._matrix(shape.vocabulary, shape.hidden),
            "model.norm.weight": self._ones(shape.hidden),
        }


_NORMS = ("input_layernorm", "post_attention_layernorm")


def write_model(run: Run, name: str, shape: Shape) -> Path:
    """Writes a checkpoint to the scratch folder, one shard per layer."""
    folder = run.scratch / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(shape.config()))
    weights, weight_map = _Weights(shape, run.device), dict[str, str]()
    for number in range(shape.layers + 1):
        tensors = weights.layer(number) if number < shape.layers else weights.rest()
        shard = f"model-{number + 1:05d}-of-{shape.layers + 1:05d}.safetensors"
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
    _write_index(folder, weight_map)
    return folder


def _write_index(folder: Path, weight_map: dict[str, str]) -> None:
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def first_layer(source: Path) -> Path:
    """The same checkpoint with its first decoder layer alone, for what takes long; shares the shards."""
    folder = source.with_name(f"{source.name}-1")
    folder.mkdir()
    config = json.loads((source / "config.json").read_text()) | {"num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    weight_map = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    kept = {name: shard for name, shard in weight_map.items() if ".layers." not in name or ".layers.0." in name}
    _write_index(folder, kept)
    for shard in set(kept.values()):
        os.link(source / shard, folder / shard)
    return folder


def token_ids(run: Run, rows: int, length: int, vocabulary: int) -> Path:
    """Random calibration sequences, as a file of token ids."""
    path = run.scratch / f"ids-{rows}-{length}-{vocabulary}.npy"
    if not path.exists():
        np.save(path, np.random.default_rng(0).integers(4, vocabulary, (rows, length)))
    return path
