"""Collects names, dtypes and shapes of a checkpoint's tensors, in the order in which its files hold them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

Config: TypeAlias = dict[str, Any]
Shape: TypeAlias = tuple[int, ...]

# Bytes per element of the dtypes that safetensors names.
ITEM_SIZES = {
    "F32": 4,
    "BF16": 2,
    "F16": 2,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "U8": 1,
    "I8": 1,
    "I32": 4,
    "I64": 8,
}
GATED = ("gate_proj", "up_proj", "down_proj")
MIXTRAL_GATED = ("w1", "w3", "w2")
# What describes how other tensors are quantised.
SCALE_ENDINGS = (
    *("_scale_inv", "_scales", ".weight_scale", "activation_scale"),
    *(".weight_shape", ".qzeros", ".scales", ".g_idx", ".weight_scale_2", ".input_scale"),
)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A stored tensor.

    Attributes:
        dtype: As safetensors names it.
        shape: As the header gives it.
    """

    dtype: str
    shape: Shape

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8:
    """How a checkpoint stores matrices in FP8.

    Attributes:
        scales: Dtype of the scales.
        suffix: What takes the place of ``weight`` in the name of a scale.
        block: Rows and columns that share a scale; ``None`` is one scale for the whole tensor, and another for its
            inputs.
    """

    scales: str
    suffix: str = "weight_scale_inv"
    block: tuple[int, int] | None = (128, 128)


@dataclass(slots=True)
class Tensors:
    """The tensors of a checkpoint.

    Attributes:
        dtype: Dtype of whatever does not name its own.
        fp8: How linear layers are quantised; ``None`` if they are not.
        items: The tensors by name.
    """

    dtype: str = "BF16"
    fp8: Fp8 | None = None
    items: dict[str, TensorSpec] = field(default_factory=dict)

    def add(self, name: str, *shape: int, dtype: str | None = None) -> None:
        """Adds one tensor under its full name."""
        assert name not in self.items, f"{name} is added twice"
        self.items[name] = TensorSpec(dtype or self.dtype, shape)

    def linear(self, name: str, rows: int, columns: int, *, bias: bool = False, is_quantized: bool = True) -> None:
        """Adds a matrix ``[rows, columns]``, with its block scales if the checkpoint is quantised."""
        if self.fp8 is not None and is_quantized:
            self.add(f"{name}.weight", rows, columns, dtype="F8_E4M3")
            grid = () if self.fp8.block is None else (-(-rows // self.fp8.block[0]), -(-columns // self.fp8.block[1]))
            self.add(f"{name}.{self.fp8.suffix}", *grid, dtype=self.fp8.scales)
            if self.fp8.block is None:
                self.add(f"{name}.activation_scale", dtype=self.fp8.scales)
        else:
            self.add(f"{name}.weight", rows, columns)
        if bias:
            self.add(f"{name}.bias", rows)

    def norm(self, name: str, size: int, *, bias: bool = False, dtype: str | None = None) -> None:
        """Adds the weight of a norm."""
        self.add(f"{name}.weight", size, dtype=dtype)
        if bias:
            self.add(f"{name}.bias", size, dtype=dtype)

    def norms(self, prefix: str, names: Sequence[str], size: int, *, bias: bool = False) -> None:
        """Adds several norms of one size."""
        for name in names:
            self.norm(f"{prefix}.{name}", size, bias=bias)

    def mlp(self, name: str, hidden: int, inner: int, names: Sequence[str] = GATED) -> None:
        """Adds a gated feed-forward block; an empty name of the gate leaves it out."""
        gate, up, down = names
        if gate:
            self.linear(f"{name}.{gate}", inner, hidden)
        self.linear(f"{name}.{up}", inner, hidden)
        self.linear(f"{name}.{down}", hidden, inner)

    def experts(self, name: str, count: int, hidden: int, inner: int, names: Sequence[str] = GATED) -> None:
        """Adds experts that are stored one by one."""
        for expert in range(count):
            self.mlp(f"{name}.{expert}", hidden, inner, names)

    @property
    def parameters(self) -> int:
        """Numbers of the model that are stored: scales do not count, and packed formats hold several in an element."""
        return sum(
            math.prod(spec.shape) * _numbers_per_element(spec.dtype)
            for name, spec in self.items.items()
            if not is_scale(name, spec)
        )


def is_scale(name: str, spec: TensorSpec) -> bool:
    """Whether a tensor describes how others are quantised."""
    return name.endswith(SCALE_ENDINGS) or spec.dtype == "F8_E8M0"


def _numbers_per_element(dtype: str) -> int:
    """Weights in one stored element: numbers of four bits, two in a byte or eight in an integer of 32 bits."""
    if dtype in ("I8", "U8"):
        return 2
    return 8 if dtype == "I32" else 1


def embeddings(t: Tensors, config: Config, prefix: str = "model.", *, head: str = "lm_head") -> None:
    """Adds token embedding, final norm and, unless tied, the head of a model of the usual names."""
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    t.add(f"{prefix}embed_tokens.weight", vocabulary, hidden)
    t.norm(f"{prefix}norm", hidden)
    if not config.get("tie_word_embeddings"):
        t.add(f"{head}.weight", vocabulary, hidden)


def head_dim(config: Config) -> int:
    """Size of an attention head."""
    size: int = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return size


def attention(
    t: Tensors, name: str, config: Config, *, bias: bool = False, o_bias: bool = False, gated: int = 1
) -> None:
    """Adds grouped-query attention.

    Args:
        t: Where to.
        name: Prefix of its projections.
        config: For the number and the size of its heads.
        bias: Whether queries, keys and values have one.
        o_bias: Whether the output projection has one.
        gated: Rows of the query projection per row of a query: 2 where it also computes a gate.
    """
    hidden, size = config["hidden_size"], head_dim(config)
    queries, keys = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    t.linear(f"{name}.q_proj", queries * gated, hidden, bias=bias)
    t.linear(f"{name}.k_proj", keys, hidden, bias=bias)
    t.linear(f"{name}.v_proj", keys, hidden, bias=bias)
    t.linear(f"{name}.o_proj", hidden, queries, bias=o_bias)


def latent_attention(t: Tensors, name: str, config: Config) -> None:
    """Adds multi-head latent attention, whose queries, keys and values pass through low ranks."""
    hidden, heads, rank = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    rotary = config["qk_rope_head_dim"]
    queries = heads * (config["qk_nope_head_dim"] + rotary)
    if config.get("q_lora_rank") is None:
        t.linear(f"{name}.q_proj", queries, hidden)
    else:
        t.linear(f"{name}.q_a_proj", config["q_lora_rank"], hidden)
        t.norm(f"{name}.q_a_layernorm", config["q_lora_rank"])
        t.linear(f"{name}.q_b_proj", queries, config["q_lora_rank"])
    t.linear(f"{name}.kv_a_proj_with_mqa", rank + rotary, hidden)
    t.norm(f"{name}.kv_a_layernorm", rank)
    t.linear(f"{name}.kv_b_proj", heads * (config["qk_nope_head_dim"] + config["v_head_dim"]), rank)
    t.linear(f"{name}.o_proj", hidden, heads * config["v_head_dim"])


NORMS = ("input_layernorm", "post_attention_layernorm")
