"""The multi-token prediction (MTP) head of a checkpoint: one more decoder layer, and what leads into it.

For token i of a sequence the head predicts token i + 2. The hidden state of token i, after the model's final norm, and
the embedding of token i + 1 are normalised, joined (the embedding first) and projected to the hidden size; a decoder
layer of the model's own class follows, then a norm and the model's head. transformers (``MtpModel``), vLLM and SGLang
all run it so. transformers loads it apart from the model, under names that depend on the family.

B sequences of S tokens, H hidden size.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

# Text decoders whose MTP head is known to compute as described above.
KNOWN_TYPES = frozenset(
    {
        "deepseek_v3",
        "deepseek_v32",
        "glm4_moe",
        "glm4_moe_lite",
        "glm4v_moe_text",
        "glm_moe_dsa",
        "mellum",
        "qwen3_5_moe_text",
        "qwen3_next",
    }
)
# What a head has besides its decoder layer, by its name within the layer; DeepSeek and GLM store it under these names.
PARTS = ("enorm", "hnorm", "eh_proj", "shared_head.norm")
# The names of Qwen, below ``mtp.``.
QWEN_PARTS: Mapping[str, str] = {
    "pre_fc_norm_embedding": "enorm",
    "pre_fc_norm_hidden": "hnorm",
    "fc": "eh_proj",
    "norm": "shared_head.norm",
}
# Copies of the embedding and of the model's head: by definition the same numbers, so they are copied and never run.
COPIES = ("embed_tokens.", "shared_head.head.")
# What a head's decoder layer is, where a config lists a kind per layer.
KINDS: Mapping[str, str] = {"layer_types": "full_attention", "mlp_layer_types": "sparse", "indexer_types": "full"}
# A decoder that has it has nothing else.
INDEXED = "indexed_attention"


@dataclass(frozen=True, slots=True, kw_only=True)
class MtpHead:
    """An MTP head, as a decoder layer after the last one.

    Attributes:
        layer: Index of that layer, the number of decoder layers that the model itself has.
        keys: Its stored keys.
        copies: Those that repeat the embedding or the head of the model.
        prefix: How the stored keys begin, if they are not those of a decoder layer; ``mtp.`` in Qwen.
    """

    layer: int
    keys: frozenset[str]
    copies: frozenset[str] = frozenset()
    prefix: str | None = None

    def as_layer(self, key: str, layers_name: str) -> str:
        """A stored key under the name that it would have as a part of a decoder layer.

        Args:
            key: Any stored key; one that is not the head's is returned as it is.
            layers_name: Name of the list of decoder layers, ``model.layers``.
        """
        if self.prefix is None or key not in self.keys:
            return key
        below = key.removeprefix(self.prefix)
        for stored, part in (("layers.0", ""), *QWEN_PARTS.items()):
            if below.startswith(f"{stored}."):
                return ".".join(filter(None, (layers_name, str(self.layer), part, below.removeprefix(f"{stored}."))))
        return key


def is_mtp_key(key: str, stacks: Iterable[str], depth: int) -> bool:
    """Whether a stored key belongs to an MTP head: one below ``mtp`` or the like, or in a layer after the last one.

    Args:
        key: The key.
        stacks: How the keys of decoder layers begin, up to the number of the layer: ``model.layers.``.
        depth: Number of decoder layers.
    """
    if re.search(r"(?:^|\.)mtp(?:_\w+)?\.", key):
        return True
    match = re.match(r"(.*?\.)(\d+)\.", key)
    return match is not None and match.group(1) in stacks and int(match.group(2)) >= depth


def has_experts(keys: Iterable[str]) -> bool:
    """Whether any of an MTP head's keys belongs to an expert; a dense head does not depend on their number."""
    return any(re.search(r"(?:^|\.)\w*experts?\w*\.", key) for key in keys)


def find_head(keys: Iterable[str], config: PreTrainedConfig) -> MtpHead | None:
    """Finds the MTP head of a checkpoint, if its decoder layer has experts and its arithmetic is known.

    Args:
        keys: All stored keys.
        config: The config of the model, as transformers builds it.
    """
    text_config: Any = config.get_text_config()
    if text_config.model_type not in KNOWN_TYPES:
        return None
    stored, depth = set(keys), int(text_config.num_hidden_layers)
    for key in sorted(stored):
        # DeepSeek and GLM number the head as a layer, Qwen has a name for it.
        layer = re.fullmatch(rf"(.*\blayers\.){depth}\.eh_proj\.weight", key)
        named = re.fullmatch(r"(.*\bmtp\.)fc\.weight", key)
        if layer is not None:
            return _numbered_head(stored, layer.group(1), depth)
        if named is not None:
            return _named_head(stored, named.group(1), depth)
    return None


def why_unknown(config: PreTrainedConfig) -> str:
    """Why ``find_head`` finds none in a checkpoint that has one with experts."""
    model_type = config.get_text_config().model_type
    if model_type in KNOWN_TYPES:
        return f"but its tensors are not those of the one head that {model_type} has"
    return f"and how a head of {model_type} computes is not known"


def _numbered_head(stored: set[str], stack: str, depth: int) -> MtpHead | None:
    """The head that is stored as ``model.layers.61``; ``None`` if something is missing, or there are several."""
    prefix = f"{stack}{depth}."
    keys = {key for key in stored if key.startswith(prefix)}
    is_alone = not any(key.startswith(f"{stack}{depth + 1}.") for key in stored)
    if not is_alone or not has_experts(keys) or not {f"{prefix}{part}.weight" for part in PARTS} <= keys:
        return None
    copies = {key for key in keys if key.removeprefix(prefix).startswith(COPIES)}
    return MtpHead(layer=depth, keys=frozenset(keys), copies=frozenset(copies))


def _named_head(stored: set[str], prefix: str, depth: int) -> MtpHead | None:
    """The head that is stored as ``mtp``; ``None`` if something is missing, or there are several layers."""
    keys = {key for key in stored if key.startswith(prefix)}
    is_alone = not any(key.startswith(f"{prefix}layers.1.") for key in keys)
    if not is_alone or not has_experts(keys) or not {f"{prefix}{part}.weight" for part in QWEN_PARTS} <= keys:
        return None
    return MtpHead(layer=depth, keys=frozenset(keys), prefix=prefix)


# Configs


@contextmanager
def with_head(config: PreTrainedConfig) -> Iterator[None]:
    """Lets a model be built with one decoder layer more, inside a ``with`` block.

    Afterwards the config has its number of layers again, which is what the model's forward runs; lists with an entry
    per layer keep that of the head.
    """
    text_config: Any = config.get_text_config()
    for name, kind in KINDS.items():
        entries = getattr(text_config, name, None)
        if isinstance(entries, list | tuple) and len(entries) == text_config.num_hidden_layers:
            own = getattr(text_config, f"mtp_{name}", None)
            last = own[0] if own else INDEXED if entries[-1] == INDEXED else kind
            setattr(text_config, name, [*entries, last])
    text_config.num_hidden_layers += 1
    try:
        yield
    finally:
        text_config.num_hidden_layers -= 1


@contextmanager
def running_head(config: PreTrainedConfig) -> Iterator[None]:
    """Lets a model's forward run a single layer, of the kind of its head, inside a ``with`` block."""
    text_config: Any = config.get_text_config()
    before = {"num_hidden_layers": text_config.num_hidden_layers}
    for name in KINDS:
        entries = getattr(text_config, name, None)
        if isinstance(entries, list | tuple) and entries:
            before[name] = entries
            setattr(text_config, name, [entries[-1]] * len(entries))
    text_config.num_hidden_layers = 1
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(text_config, name, value)


# Modules


def add_parts(layer: nn.Module, config: PreTrainedConfig, dtype: torch.dtype) -> None:
    """Adds to a decoder layer, on the meta device, what a head has besides: see ``PARTS``.

    The layer's forward does not run them.
    """
    text_config: Any = config.get_text_config()
    norm: Any = type(layer.input_layernorm)
    size, eps = text_config.hidden_size, text_config.rms_norm_eps
    with torch.device("meta"):
        parts = {
            "enorm": norm(size, eps=eps),
            "hnorm": norm(size, eps=eps),
            "eh_proj": nn.Linear(2 * size, size, bias=False),
            "shared_head": nn.ModuleDict({"norm": norm(size, eps=eps)}),
        }
    for name, part in parts.items():
        setattr(layer, name, part.to(dtype).eval().requires_grad_(False))


def enter(layer: Any, embeddings_BSH: Tensor, hidden_BSH: Tensor) -> Tensor:
    """What goes into the decoder layer of a head, ``[B, S, H]``.

    Args:
        layer: The layer, its weights loaded.
        embeddings_BSH: For every token the embedding of the next one.
        hidden_BSH: For every token the model's hidden state after its final norm.
    """
    joined = torch.cat([layer.enorm(embeddings_BSH), layer.hnorm(hidden_BSH)], dim=-1)
    found: Tensor = layer.eh_proj(joined)
    return found
