"""How a result is quantised: which formats its shape fits, and commands for those that are known to take it."""

import json
import shlex
from dataclasses import dataclass

from hcsmoe_hub.checkpoint.result_formats import Format, Shape, formats_that_do_not, formats_that_fit, read_shape
from hcsmoe_hub.model_cards.card_data import CardData
from hcsmoe_hub.model_cards.programs import LLAMA_CPP, MLX_LM, VLLM, programs_for

# Weights that blocks of 32 have to span whole rows of, and what MLX takes in place of its default of 64.
SHORT_BLOCK = 32
# What stays unquantised: embedding and head, and routers, which decide by small differences.
UNQUANTISED = ("lm_head", "model.embed_tokens", "re:.*gate$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantising:
    """What the section on quantising needs to know.

    Attributes:
        shape: Sizes of the routed experts.
        fitting: Names of the formats that fit.
        unfit: The formats that do not.
        gguf: GGUF files of 8 and 4 bits, as words of a shell, by llama.cpp's names of their types; empty if llama.cpp
            is not known to run the result.
        fp8: Call of llm-compressor; empty if vLLM is not known to run the result.
        mlx: Command for mlx-lm; empty if that is not known to run the result.
    """

    shape: Shape
    fitting: list[str]
    unfit: list[Format]
    gguf: dict[str, str]
    fp8: str
    mlx: str


def quantising(card: CardData) -> Quantising | None:
    """How a result is quantised; ``None`` if it is, or no program that quantises is known to take it."""
    programs = programs_for(card) if card.has_tokenizer else []
    shape = read_shape(card.config, card.report.experts.get("width_after"))
    if not programs or shape is None or card.config.get("quantization_config"):
        return None
    fitting = [known.name for known in formats_that_fit(shape)]
    return Quantising(
        shape=shape,
        fitting=fitting,
        unfit=formats_that_do_not(shape),
        gguf=_gguf(card, fitting) if LLAMA_CPP in programs else {},
        fp8=_fp8(card, fitting) if VLLM in programs else "",
        mlx=_mlx(card, shape, fitting) if MLX_LM in programs else "",
    )


def _gguf(card: CardData, fitting: list[str]) -> dict[str, str]:
    if "GGUF Q8_0 and Q4_0" not in fitting:
        return {}
    # Where blocks of 256 do not fit, what llama.cpp takes instead of Q4_K_M is larger than Q4_0.
    four_bits = "Q4_K_M" if "GGUF K-quants" in fitting else "Q4_0"
    return {kind: shlex.quote(f"{card.title}-{kind}.gguf") for kind in ("Q8_0", four_bits)}


def _fp8(card: CardData, fitting: list[str]) -> str:
    if "FP8 per channel" not in fitting:
        return ""
    scheme = "FP8_BLOCK" if "FP8 in blocks of 128" in fitting else "FP8_DYNAMIC"
    places = f"{json.dumps(card.location)}, {json.dumps(f'{card.title}-FP8')}"
    return f'model_free_ptq({places}, scheme="{scheme}", ignore={json.dumps(UNQUANTISED)}, device="cuda:0")'


def _mlx(card: CardData, shape: Shape, fitting: list[str]) -> str:
    if "MLX in groups of 64" in fitting:
        group = ""
    elif shape.width % SHORT_BLOCK or shape.hidden_size % SHORT_BLOCK:
        return ""
    else:
        group = f" --q-group-size {SHORT_BLOCK}"
    target = shlex.quote(f"{card.title}-4bit")
    return f"mlx_lm.convert --hf-path {shlex.quote(card.location)} --mlx-path {target} -q --q-bits 4{group}"
