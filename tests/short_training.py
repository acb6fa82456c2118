"""What tests of ``refit='model'`` train: a tiny model whose experts matter, for a few small steps."""

from pathlib import Path
from typing import Any

import pytest
from tiny_models import build, change_tensors
from torch import Tensor


def shorten_training(patch: pytest.MonkeyPatch) -> None:
    """A few small steps, and none in the layers alone, which have tests of their own."""
    patch.setattr("hcsmoe_hub.layer.reducer.refit_layer", lambda *_, **__: None)
    patch.setattr("hcsmoe_hub.methods.distil.training.STEP_TOKENS", 48)
    patch.setattr("hcsmoe_hub.methods.distil.training.MOST_PASSES", 4)


def build_loud(folder: Path, model_type: str = "mixtral", **others: Any) -> Path:
    """A tiny model whose experts matter for its logits; see ``tiny_models.build``."""
    build(folder, model_type, **others)

    def enlarge(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if ".experts." in name:
                tensor.mul_(2.5)

    change_tensors(folder, enlarge)
    return folder
