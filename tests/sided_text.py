"""Tokenizers of models with an encoder, whose ids can be read, and how tests plan and load text for them.

Word w7 is id WORD + 7 in the tokenizer of T5; that of NLLB has one id per character.
"""

from pathlib import Path
from typing import Any

from calibration_text import refusal
from transformers import NllbTokenizer, T5Tokenizer

from hcsmoe_hub.calibration.calibration_set import CalibrationSet
from hcsmoe_hub.calibration.plan import CalibrationPlan, plan_calibration
from hcsmoe_hub.calibration.text import load_calibration
from hcsmoe_hub.errors import HcsmoeError
from hcsmoe_hub.events import Listener, ignore
from hcsmoe_hub.options import CalibrationOptions

PAD, END, UNKNOWN, SPACE, WORD = 0, 1, 2, 3, 4
WORDS, SENTINELS = 400, 100
# The last sentinel comes first.
FIRST_SENTINEL = WORD + WORDS + SENTINELS - 1
T5_VOCABULARY = WORD + WORDS + SENTINELS
LANGUAGES = ("eng_Latn", "deu_Latn", "fra_Latn")


def write_t5_tokenizer(folder: Path, *, sentinels: int = SENTINELS) -> Path:
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -20.0)]
    vocabulary += [(f"▁w{number}", -1.0) for number in range(WORDS)]
    vocabulary += [(f"<extra_id_{number}>", 0.0) for number in reversed(range(sentinels))]
    T5Tokenizer(vocab=vocabulary, extra_ids=sentinels).save_pretrained(folder)
    return folder


def write_nllb_tokenizer(folder: Path, **settings: Any) -> Path:
    vocabulary = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
    for character in "▁abcdefghijklmnopqrstuvwxyz0123456789":
        vocabulary[character] = len(vocabulary)
    NllbTokenizer(vocab=vocabulary, merges=[], additional_special_tokens=list(LANGUAGES), **settings).save_pretrained(
        folder
    )
    return folder


def words(start: int, count: int) -> list[int]:
    """Ids of ``count`` words from word ``start`` in the tokenizer of T5."""
    return list(range(WORD + start, WORD + start + count))


def plan_sides(dataset: Path | str, *, max_positions: int | None = None, **options: Any) -> CalibrationPlan:
    chosen = CalibrationOptions(dataset=str(dataset), **({"samples": 2, "sequence_length": 12} | options))
    return plan_calibration(
        chosen,
        max_positions=max_positions,
        has_tokenizer=True,
        label="org/model",
        fits=False,
        is_encoder_decoder=True,
    )


def load_sides(
    folder: Path, dataset: Path | str, *, vocab_size: int = T5_VOCABULARY, emit: Listener = ignore, **options: Any
) -> CalibrationSet:
    """Plans and loads with the tokenizer in a folder."""
    return load_calibration(plan_sides(dataset, **options), tokenizer_folder=folder, vocab_size=vocab_size, emit=emit)


def refused_sides(folder: Path, dataset: Path | str, **options: Any) -> HcsmoeError:
    """The refusal of a calibration set."""
    return refusal(lambda: load_sides(folder, dataset, **options), HcsmoeError)
