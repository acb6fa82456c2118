"""Tiny random checkpoints, written by transformers itself, and what tests need to convert, compare and damage them."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from hcsmoe_hub import plan as plan_conversion
from hcsmoe_hub.errors import HcsmoeError
from hcsmoe_hub.options import CalibrationOptions, ConvertOptions, MethodOptions, Preset

SEQUENCES, LENGTH, VOCABULARY = 4, 16, 64
INDEX = "model.safetensors.index.json"

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
}
# What an architecture needs besides the common sizes.
OWN_SIZES: Mapping[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8},
    "qwen3_moe": {"num_experts": 8},
    # Three layers, of which the first is dense.
    "deepseek_v3": {
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "num_hidden_layers": 3,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
}


def build(
    folder: Path,
    model_type: str = "mixtral",
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "40KB",
    as_published: bool = True,
    **settings: Any,
) -> Path:
    """Writes a checkpoint of random weights.

    Args:
        folder: Where to.
        model_type: Architecture.
        dtype: Dtype of every tensor.
        max_shard_size: Small enough for several shards.
        as_published: Expert by expert, as published checkpoints are; otherwise fused, as transformers holds them.
        settings: Keys of the config.

    Returns:
        The folder.
    """
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(SIZES | OWN_SIZES.get(model_type, {}) | settings))
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Far enough from each other that experts, and routers, can be distinguished.
            parameter.normal_(0, 0.2)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size, save_original_format=as_published)
    return folder


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, as safetensors itself reads it."""
    return {name: tensor for shard in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(shard).items()}


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], *, shards: int = 3) -> None:
    """Replaces the weights of a checkpoint: equal numbers of tensors to each of at least two shards."""
    for old in folder.glob("*.safetensors"):
        old.unlink()
    names = [f"model-{number + 1:05}-of-{shards:05}.safetensors" for number in range(shards)]
    places = {name: names[number % shards] for number, name in enumerate(tensors)}
    for shard in names:
        content = {name: tensor.contiguous() for name, tensor in tensors.items() if places[name] == shard}
        save_file(content, folder / shard, metadata={"format": "pt"})
    size = sum(tensor.nbytes for tensor in tensors.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": places}))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Lets ``change`` edit the tensors of a checkpoint, by name."""
    tensors = read_tensors(folder)
    change(tensors)
    write_tensors(folder, tensors)


def read_config(folder: Path) -> dict[str, Any]:
    """The raw ``config.json``."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def change_config(folder: Path, **changes: Any) -> None:
    """Sets keys of ``config.json``."""
    (folder / "config.json").write_text(json.dumps(read_config(folder) | changes))


def token_ids(sequences: int = SEQUENCES, length: int = LENGTH) -> Tensor:
    """Calibration tokens ``[B, S]``."""
    return torch.randint(0, VOCABULARY, (sequences, length), generator=torch.Generator().manual_seed(1))


def options(
    source: Path, experts: int | None, *, ids: Tensor | None = None, output: Path | None = None, **others: Any
) -> ConvertOptions:
    """Options of a conversion into ``result`` next to the source, with the token ids from there."""
    file = source.parent / "ids.npy"
    np.save(file, (token_ids() if ids is None else ids).numpy())
    # As published and uncorrected, unless a test asks for something else.
    others.setdefault("method", MethodOptions(preset=Preset.HC_SMOE))
    return ConvertOptions(
        experts=experts,
        output=output or source.parent / "result",
        calibration=CalibrationOptions(dataset=str(file)),
        **others,
    )


def same_bits(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bytes."""
    same_kind = (found.dtype, found.shape) == (expected.dtype, expected.shape)
    return same_kind and torch.equal(found.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))


def differing(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Names that only one side has, or whose tensors differ in any bit."""
    common = found.keys() & expected.keys()
    return sorted(
        (found.keys() ^ expected.keys()) | {name for name in common if not same_bits(found[name], expected[name])}
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its relative name."""
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def refuse(source: Path, kind: type[HcsmoeError], wanted: ConvertOptions) -> HcsmoeError:
    """The refusal of a plan, which has a hint; nothing in the source's surroundings may have changed."""
    before = contents(source.parent)
    with pytest.raises(kind) as caught:
        plan_conversion(source, wanted)
    assert type(caught.value) is kind
    assert caught.value.hint
    assert contents(source.parent) == before
    assert not (source.parent / "result").exists()
    return caught.value
