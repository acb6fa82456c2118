"""How a result is loaded, in every program that is known to run it."""

import json
import shlex
from dataclasses import dataclass

from hcsmoe_hub.checkpoint.auto_class import WRONG_EXPERTS, auto_class
from hcsmoe_hub.model_cards.card_data import CardData
from hcsmoe_hub.model_cards.programs import Program, expert_parallel_sizes, programs_for, tensor_parallel_sizes

# Prompts for models that were not trained to go on with a text.
PROMPTS = {
    "nllb-moe": "The sky is blue because it scatters light.",
    "switch_transformers": "The <extra_id_0> is blue because it scatters <extra_id_1>.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What commands and snippets need to know.

    Attributes:
        literal: The repository or folder as a Python string.
        quoted: The same as a word of a shell.
        folder: Local folder for programs that convert a checkpoint, as a word of a shell.
        gguf: File that llama.cpp converts to, as a word of a shell.
        loader: The auto class of transformers that loads it.
        prompt: A prompt that suits the model.
        translates: Whether it translates from one language into another.
        warning: What the version of transformers that made it computes wrongly; empty if nothing is known.
        programs: The programs besides transformers that are known to run it.
        tensor_parallel: Sizes of tensor parallelism that fit; empty if only the base model's config class knows.
        expert_parallel: Sizes of expert parallelism that fit.
    """

    literal: str
    quoted: str
    folder: str
    gguf: str
    loader: str
    prompt: str
    translates: bool
    warning: str
    programs: dict[str, Program]
    tensor_parallel: list[str]
    expert_parallel: list[str]


def usage(card: CardData) -> Usage:
    """How a result is loaded."""
    model_type = card.base.model_type
    return Usage(
        literal=json.dumps(card.location),
        quoted=shlex.quote(card.location),
        folder=shlex.quote(card.title),
        gguf=shlex.quote(f"{card.title}.gguf"),
        loader=auto_class(model_type).name,
        prompt=PROMPTS.get(model_type, "Why is the sky blue?" if card.is_chat else "The sky is blue because"),
        translates=auto_class(model_type).task == "translation",
        warning=next((warning for warning in card.report.warnings if WRONG_EXPERTS in warning), ""),
        # Programs that answer prompts need a tokenizer.
        programs={program.name: program for program in programs_for(card)} if card.has_tokenizer else {},
        tensor_parallel=[str(size) for size in tensor_parallel_sizes(card)],
        expert_parallel=[str(size) for size in expert_parallel_sizes(card)],
    )
