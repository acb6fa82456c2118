"""Calibration text whose ids can be read, a tokenizer for it, and what tests need to write and to plan it.

Word w7 is id FIRST + 7.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from hcsmoe_hub.calibration.plan import CalibrationPlan, plan_calibration
from hcsmoe_hub.calibration.text import load_calibration
from hcsmoe_hub.errors import CalibrationError, HcsmoeError
from hcsmoe_hub.events import Listener, ignore
from hcsmoe_hub.options import CalibrationOptions

EOS, UNKNOWN, USER, ASSISTANT, FIRST = 0, 1, 2, 3, 4
WORDS = 400
VOCABULARY = FIRST + WORDS

# Loads calibration tokens: what the fixture of this name gives.
Load = Callable[..., Tensor]


def write_tokenizer(folder: Path, **settings: Any) -> Path:
    vocabulary = {"</s>": EOS, "[UNK]": UNKNOWN, "user": USER, "assistant": ASSISTANT}
    vocabulary |= {f"w{number}": FIRST + number for number in range(WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", **settings).save_pretrained(folder)
    return folder


def ids(start: int, count: int) -> list[int]:
    """Ids of ``count`` words from word ``start``."""
    return list(range(FIRST + start, FIRST + start + count))


def text(start: int, count: int) -> str:
    """The words of ``ids``."""
    return " ".join(f"w{number}" for number in range(start, start + count))


def plan(dataset: Path | str, *, max_positions: int | None = 64, **options: Any) -> CalibrationPlan:
    chosen = CalibrationOptions(dataset=str(dataset), **({"samples": 2, "sequence_length": 4} | options))
    return plan_calibration(chosen, max_positions=max_positions, has_tokenizer=True, label="org/model", fits=False)


def load_token_ids(
    plan: CalibrationPlan, *, tokenizer_folder: Path, vocab_size: int, emit: Listener = ignore
) -> Tensor:
    """The sequences to calibrate on, without their domains and what is measured."""
    return load_calibration(plan, tokenizer_folder=tokenizer_folder, vocab_size=vocab_size, emit=emit).token_ids


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_texts(path: Path, texts: Sequence[str]) -> Path:
    return write_rows(path, [{"text": one} for one in texts])


def refusal(action: Callable[[], Any], kind: type[HcsmoeError] = CalibrationError) -> HcsmoeError:
    with pytest.raises(kind) as caught:
        action()
    assert caught.value.hint, "a refusal says what to do"
    return caught.value


def save(path: Path, array: Any) -> Path:
    np.save(path, np.asarray(array), allow_pickle=True)
    return path
