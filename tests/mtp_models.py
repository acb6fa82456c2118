"""Tiny checkpoints with a multi-token prediction (MTP) head under its published names, and the head run on its own."""

import re
from pathlib import Path
from typing import Any

import torch
from tiny_models import build, change_config, change_tensors, read_config, read_tensors
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import MtpModel

HIDDEN, VOCABULARY = 32, 64
QWEN_NAMES = {
    "enorm": "pre_fc_norm_embedding",
    "hnorm": "pre_fc_norm_hidden",
    "eh_proj": "fc",
    "shared_head.norm": "norm",
}
LINEAR = {
    "linear_key_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 24,
    "num_experts": 8,
}
MLA = {
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
INDEXER = {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 2}
# What an architecture needs besides the common sizes.
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v3": MLA,
    "deepseek_v32": MLA | INDEXER,
    "glm4_moe": {"n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "glm4_moe_lite": MLA | {"n_group": 1},
    "glm_moe_dsa": MLA | INDEXER | {"n_group": 1},
    "qwen3_next": LINEAR,
    "qwen3_5_moe_text": LINEAR,
}


def is_named(model_type: str) -> bool:
    """Whether the head has a name of its own instead of the number of a layer."""
    return model_type.startswith("qwen")


def build_with_head(folder: Path, model_type: str, *, layers: int = 2, copies: bool = True, **settings: Any) -> Path:
    """Writes a checkpoint of random weights with an MTP head: the last layer of a model with one more.

    Args:
        folder: Where to.
        model_type: Architecture.
        layers: Decoder layers besides the head.
        copies: Whether the head repeats the embedding and the model's head, where its family does that.
        settings: Keys of the config.
    """
    kinds = (
        {"layer_types": ["linear_attention"] * (layers - 1) + ["full_attention"] * 2} if is_named(model_type) else {}
    )
    sizes = FAMILIES[model_type] | kinds | settings
    build(folder, model_type, num_hidden_layers=layers + 1, **sizes)
    config = read_config(folder)
    changes = {name: value[:-1] for name, value in config.items() if name.endswith("_types")}
    count = "mtp_num_hidden_layers" if is_named(model_type) else "num_nextn_predict_layers"
    change_config(folder, num_hidden_layers=layers, **{count: 1}, **changes)
    change_tensors(folder, lambda tensors: _add_head(tensors, model_type, layers, copies=copies))
    return folder


def _add_head(tensors: dict[str, Tensor], model_type: str, layer: int, *, copies: bool) -> None:
    torch.manual_seed(1)
    prefix = f"model.layers.{layer}."
    parts = {
        "enorm.weight": torch.randn(HIDDEN),
        "hnorm.weight": torch.randn(HIDDEN),
        "eh_proj.weight": 0.2 * torch.randn(HIDDEN, 2 * HIDDEN),
        "shared_head.norm.weight": torch.randn(HIDDEN),
    }
    if copies and not is_named(model_type):
        parts["embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        parts["shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    tensors |= {prefix + name: tensor for name, tensor in parts.items()}
    if is_named(model_type):
        for key in [key for key in tensors if key.startswith(prefix)]:
            below = key.removeprefix(prefix)
            own = next((name for name in QWEN_NAMES if below.startswith(f"{name}.")), None)
            new = f"mtp.layers.0.{below}" if own is None else "mtp." + below.replace(own, QWEN_NAMES[own])
            tensors[new] = tensors.pop(key)


def head_keys(folder: Path) -> set[str]:
    """The stored keys of the head."""
    layer = read_config(folder)["num_hidden_layers"]
    return {key for key in read_tensors(folder) if re.match(rf"mtp\.|model\.layers\.{layer}\.", key)}


def load_head(folder: Path) -> tuple[PreTrainedModel, MtpModel]:
    """A checkpoint and its head, as transformers loads the two."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = model.config
    depth = config.num_hidden_layers
    # The class names the layer of the published checkpoint, and not every config says what it is.
    model._keys_to_ignore_on_load_unexpected = [r"^mtp\.", rf"model\.layers\.{depth}\."]
    config.num_mtp_layers = 1
    for name in ("layer_types", "mlp_layer_types"):
        if getattr(config, name, None) is not None:
            setattr(config, f"mtp_{name}", [getattr(config, name)[-1]])
    return model, MtpModel.from_pretrained(model, device_map={"": "cpu"})


def run_head(model: PreTrainedModel, head: MtpModel, ids: Tensor) -> Tensor:
    """Logits ``[B, S - 1, V]`` of the head on the model's own hidden states; ``ids`` are ``[B, S]``."""
    with torch.no_grad():
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        return mtp_logits(head, hidden, ids)


def mtp_logits(head: MtpModel, hidden: Tensor, ids: Tensor) -> Tensor:
    """Logits ``[B, S - 1, V]`` of a head.

    Args:
        head: From ``load_head``.
        hidden: Hidden states ``[B, S - 1, H]`` of the first tokens, after the model's final norm.
        ids: ``[B, S]``.
    """
    positions = torch.arange(hidden.shape[1])[None]
    with torch.no_grad():
        states = head.forward_layer(0, hidden, positions, None, input_ids=ids[:, 1:])
        return head._project_to_logits(states)
