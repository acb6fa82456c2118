"""Held-out sequences for conversions whose calibration set is a file of token ids, which has none of its own."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import hcsmoe_hub.pipeline.run
from hcsmoe_hub.calibration.calibration_set import CalibrationSet
from hcsmoe_hub.events import Listener
from hcsmoe_hub.planning.conversion_plan import ConversionPlan

DOMAINS = ("code", "prose", "code")


def held_out_ids(sequences: int = 3, length: int = 16, vocabulary: int = 64) -> Tensor:
    """Held-out sequences ``[M, S]``."""
    return torch.randint(1, vocabulary, (sequences, length), generator=torch.Generator().manual_seed(7))


def hold_out(monkeypatch: pytest.MonkeyPatch, ids: Tensor, domains: tuple[str, ...] = DOMAINS) -> None:
    """Lets every conversion hold these sequences out."""
    load = hcsmoe_hub.pipeline.run.load_tokens

    def load_both(plan: ConversionPlan, emit: Listener) -> CalibrationSet:
        loaded = load(plan, emit)
        return CalibrationSet(
            token_ids=loaded.token_ids, domains=loaded.domains, measured_ids=ids, measured_domains=domains
        )

    monkeypatch.setattr(hcsmoe_hub.pipeline.run, "load_tokens", load_both)


def predictions(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits for every token of a sequence but the first, ``[M, S - 1, V]`` float32."""
    with torch.no_grad():
        return model(ids, use_cache=False).logits[:, :-1].float()


def perplexity(logits_MSV: Tensor, ids: Tensor) -> float:
    """Perplexity of these predictions."""
    losses = torch.nn.functional.cross_entropy(logits_MSV.flatten(0, 1), ids[:, 1:].flatten())
    return float(losses.exp())
