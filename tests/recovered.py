"""Recoveries of tiny results, and what tests compare of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from hcsmoe_hub.events import Event, Listener, Stage, StageAdvanced, ignore
from hcsmoe_hub.recover import RecoveryReport, recover
from hcsmoe_hub.recovery.options import RecoverOptions

SEQUENCES, LENGTH, HELD_OUT = 48, 24, 12


class StoppedHere(Exception):
    """What ends a recovery in the middle."""


def write_text(source: Path) -> Path:
    """A file next to a source of token ids that it would write itself; the last rows are held out."""
    path = source.parent / "text.npy"
    if path.exists():
        return path
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    torch.manual_seed(0)
    first = torch.arange(SEQUENCES)[:, None]
    settings = GenerationConfig(max_new_tokens=LENGTH - 1, do_sample=True, eos_token_id=None, pad_token_id=0)
    ids = model.generate(first, attention_mask=torch.ones_like(first), generation_config=settings)
    np.save(path, ids.numpy())
    return path


def held_out(source: Path) -> Tensor:
    """The held-out rows."""
    return torch.from_numpy(np.load(source.parent / "text.npy"))[-HELD_OUT:]


def wanted(source: Path, **others: Any) -> RecoverOptions:
    """Options of a short recovery of a result next to its source."""
    settings: dict[str, Any] = {
        "teacher": source,
        "data": others["data"] if "data" in others else write_text(source),
        "output": source.parent / "recovered",
        "batch_size": 8,
        "max_steps": 12,
        "evaluate_every": 4,
        "held_out": 0.25,
        "learning_rate": 0.02,
        "device": "cpu",
        # On every processor the same.
        "dtype": "float32",
    }
    return RecoverOptions(**(settings | others))


def run(source: Path, *, listener: Listener = ignore, **others: Any) -> RecoveryReport:
    """Recovers ``result`` next to a source."""
    return recover(source.parent / "result", wanted(source, **others), listener=listener)


def stop_at(step: int) -> Callable[[Event], None]:
    """Ends a recovery once a step is done, before anything of it is saved."""

    def listen(event: Event) -> None:
        is_step = isinstance(event, StageAdvanced) and event.stage is Stage.RECOVER
        if is_step and event.detail.startswith(f"step {step},"):
            raise StoppedHere

    return listen


def interrupt(source: Path, step: int, **others: Any) -> None:
    """Begins to recover ``result`` next to a source, and ends in a step."""
    with pytest.raises(StoppedHere):
        run(source, listener=stop_at(step), **others)


def held_out_divergence(source: Path, folder: Path) -> float:
    """Mean KL divergence of a checkpoint from its source, as transformers itself loads them."""
    ids = held_out(source)
    with torch.no_grad():
        first, second = (
            AutoModelForCausalLM.from_pretrained(each, dtype=torch.float32)(input_ids=ids).logits.log_softmax(-1)
            for each in (source, folder)
        )
    return float((first.exp() * (first - second)).sum(-1).mean())


def held_out_perplexity(source: Path, folder: Path) -> float:
    """Perplexity of a checkpoint on held-out text of a source, as transformers itself loads it."""
    ids = held_out(source)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(input_ids=ids).logits
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return float(losses.exp())
