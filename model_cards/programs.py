"""Which programs a result runs in, as far as that is known, and within which limits.

What is known comes from running small checkpoints of each architecture, with fewer experts, in the versions below and
comparing log-probabilities with transformers 5.23, and from reading the loaders of SGLang 0.5.23. It is knowledge of an
architecture, not of one result.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hcsmoe_hub.model_cards.facts import Document, Facts
from hcsmoe_hub.options import Layout

RAN = "checkpoints of this architecture with fewer experts ran in it and gave the log-probabilities of transformers"
READ = "its loader was read and takes such a checkpoint; none was run"
# Experts stored one by one, numbered from 0.
_SINGLE_EXPERT = re.compile(r"\.experts\.0\.")
# The name of the expert count that every program reads; transformers 5 saves some under another one.
COUNT_KEYS: Mapping[str, str] = {
    "mixtral": "num_local_experts",
    "qwen2_moe": "num_experts",
    "qwen3_moe": "num_experts",
    "olmoe": "num_experts",
    "deepseek_v2": "n_routed_experts",
    "deepseek_v3": "n_routed_experts",
}
# What tensor parallelism cuts into equal parts, besides attention heads.
WIDTH_KEYS: Mapping[str, tuple[str, ...]] = {
    "mixtral": ("intermediate_size",),
    "qwen2_moe": ("moe_intermediate_size", "shared_expert_intermediate_size"),
    "qwen3_moe": ("moe_intermediate_size",),
    "olmoe": ("intermediate_size",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A program that runs checkpoints.

    Attributes:
        name: Its name.
        version: What was looked at.
        evidence: What is known of the architectures.
        model_types: The architectures.
        takes: Whether it takes the names in which a result stores its tensors and its config its settings.
    """

    name: str
    version: str
    evidence: str
    model_types: frozenset[str]
    takes: Callable[[Facts], bool]


def stores_single_experts(facts: Facts) -> bool:
    """Whether the result stores experts one by one, as most programs want them."""
    return any(_SINGLE_EXPERT.search(name) for name in facts.tensors)


def _takes_anything(facts: Facts) -> bool:
    return True


def _is_in_common_words(facts: Facts) -> bool:
    """Whether the config says what programs ask for that do not know the words of transformers 5."""
    # Without its base, mlx-lm assumes another one and is wrong in silence.
    has_count = COUNT_KEYS[facts.base.model_type] in facts.config
    return stores_single_experts(facts) and has_count and "rope_theta" in facts.config


VLLM = Program(
    name="vLLM",
    version="0.32",
    evidence=RAN,
    model_types=frozenset({"mixtral", "qwen2_moe", "qwen3_moe", "olmoe"}),
    takes=_takes_anything,
)
SGLANG = Program(
    name="SGLang",
    version="0.5.23",
    evidence=READ,
    model_types=frozenset({"mixtral", "qwen2_moe", "qwen3_moe", "olmoe"}),
    takes=stores_single_experts,
)
LLAMA_CPP = Program(
    name="llama.cpp",
    version="b11434",
    evidence=RAN,
    model_types=frozenset(COUNT_KEYS),
    takes=stores_single_experts,
)
MLX_LM = Program(
    name="mlx-lm",
    version="0.32.2",
    evidence=RAN,
    model_types=frozenset(COUNT_KEYS) - {"deepseek_v2"},
    takes=_is_in_common_words,
)
PROGRAMS = (VLLM, SGLANG, LLAMA_CPP, MLX_LM)


def programs_for(facts: Facts) -> list[Program]:
    """The programs besides transformers that run a result of this architecture and layout."""
    if facts.layout is Layout.MAPPED:
        return []
    return [program for program in PROGRAMS if facts.base.model_type in program.model_types and program.takes(facts)]


def stored_experts(facts: Facts) -> int:
    """Experts per layer in the config of a result that plain programs load."""
    count: int = facts.report["experts"]["after"]
    return facts.experts_before if facts.layout is Layout.FULL else count


def tensor_parallel_sizes(facts: Facts) -> list[int]:
    """Sizes that divide heads and widths and do not exceed the experts; empty if the config leaves that open.

    vLLM and SGLang refuse more parts than there are experts in most of their models.
    """
    config: Document = facts.config
    heads, groups = config.get("num_attention_heads"), config.get("num_key_value_heads")
    keys = WIDTH_KEYS.get(facts.base.model_type, ())
    widths = [width for key in keys if isinstance(width := config.get(key), int)]
    if not isinstance(heads, int) or not isinstance(groups, int) or not keys or len(widths) < len(keys):
        return []
    return [
        size
        for size in range(1, min(stored_experts(facts), heads) + 1)
        # Key and value heads are either dealt out or copied.
        if all(number % size == 0 for number in (heads, *widths)) and max(groups, size) % min(groups, size) == 0
    ]


def expert_parallel_sizes(facts: Facts) -> list[int]:
    """Sizes that SGLang accepts: those that divide the number of experts."""
    experts = stored_experts(facts)
    return [size for size in range(1, experts + 1) if experts % size == 0]
