"""Which programs are known to run a result, and within which limits.

What is known comes from running small checkpoints of each architecture, with fewer experts, in the versions below and
comparing log-probabilities with transformers 5.23, and from reading the loaders of SGLang 0.5.23. It holds for an
architecture, not for one result.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hcsmoe_hub.checkpoint import result_formats
from hcsmoe_hub.model_cards.card_data import CardData
from hcsmoe_hub.options import Layout

RAN = "runs checkpoints of this architecture with fewer experts and matches the log-probabilities of transformers"
READ = "takes checkpoints of this architecture with fewer experts, according to its loader; none was run"
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A program that runs checkpoints.

    Attributes:
        name: Its name.
        version: The version that was tried or read.
        evidence: What is known of it and the architectures.
        model_types: The architectures.
        takes: Whether it takes the names in which a result stores its tensors and its config its settings.
    """

    name: str
    version: str
    evidence: str
    model_types: frozenset[str]
    takes: Callable[[CardData], bool]


def stores_single_experts(card: CardData) -> bool:
    """Whether the result stores experts one by one, as most programs want them."""
    return any(_SINGLE_EXPERT.search(name) for name in card.tensors)


def _takes_anything(card: CardData) -> bool:
    return True


def _has_common_keys(card: CardData) -> bool:
    """Whether the config has the keys of programs that do not know those of transformers 5."""
    # Where the base of the rotary embedding is missing, mlx-lm silently assumes another one.
    has_count = COUNT_KEYS[card.base.model_type] in card.config
    return stores_single_experts(card) and has_count and "rope_theta" in card.config


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
    takes=_has_common_keys,
)
PROGRAMS = (VLLM, SGLANG, LLAMA_CPP, MLX_LM)


def programs_for(card: CardData) -> list[Program]:
    """The programs, other than transformers, that run a result of this architecture and layout."""
    if card.layout in (Layout.MAPPED, Layout.FACTORED):
        return []
    return [program for program in PROGRAMS if card.base.model_type in program.model_types and program.takes(card)]


def stored_experts(card: CardData) -> int:
    """Experts per layer in the config of a result that plain programs load."""
    return card.experts_before if card.layout is Layout.FULL else card.report.experts["after"]


def tensor_parallel_sizes(card: CardData) -> list[int]:
    """Sizes of tensor parallelism that vLLM and SGLang accept; empty if the config leaves that open."""
    return result_formats.tensor_parallel_sizes(card.config, card.base.model_type, stored_experts(card))


def expert_parallel_sizes(card: CardData) -> list[int]:
    """Sizes that SGLang accepts: those that divide the number of experts."""
    return result_formats.expert_parallel_sizes(stored_experts(card))
