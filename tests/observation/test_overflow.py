"""Values that overflow are told from broken weights."""

from itertools import product
from pathlib import Path

import pytest
import torch
from tiny_models import build, change_tensors, options, read_tensors
from torch import Tensor

from hcsmoe_hub import convert
from hcsmoe_hub.errors import VerificationError
from hcsmoe_hub.observation.overflow import are_finite, not_finite, overflow_hint

EXPERT = "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"
FINITE, BROKEN = torch.ones(4), torch.tensor([1.0, float("nan")])


@pytest.mark.parametrize(
    ("dtype", "weights", "inputs", "said"),
    [
        (torch.float16, BROKEN, FINITE, "are not finite: the source holds broken weights."),
        (torch.bfloat16, BROKEN, BROKEN, "are not finite: the source holds broken weights."),
        (torch.float16, FINITE, FINITE, "weights in this layer are: values overflow in float16 (largest 65504)."),
        (
            torch.bfloat16,
            FINITE,
            FINITE,
            "in this layer are: values overflow in bfloat16 (largest 3.3895e+38).",
        ),
        (torch.float16, FINITE, BROKEN, "have overflowed, as values overflow in float16 (largest 65504), unless its"),
        (torch.bfloat16, FINITE, BROKEN, "weights in this layer are: an earlier layer holds broken weights."),
    ],
)
def test_the_cause_follows_from_weights_and_inputs(
    dtype: torch.dtype, weights: Tensor, inputs: Tensor, said: str
) -> None:
    error = not_finite("layer 3: the outputs are", weights=[FINITE, weights], dtype=dtype, inputs=[inputs])
    assert error.message.startswith("layer 3: the outputs are not finite")
    assert said in error.message
    assert ("verify SOURCE" in error.hint) == ("broken" in error.message)


def test_infinite_numbers_are_not_finite_and_nothing_is() -> None:
    assert not are_finite(torch.tensor([1.0, float("-inf")]))
    assert are_finite(torch.empty(0))
    assert overflow_hint(torch.float16) == "convert the bfloat16 or float32 checkpoint of the same model"


def half(folder: Path, *, factor: float, weight: float | None = None) -> Path:
    """A tiny Mixtral in float16 whose first layer adds large numbers to the hidden states."""
    source = build(folder, dtype=torch.float16)

    def change(tensors: dict[str, Tensor]) -> None:
        for expert, matrix in product(range(8), ("w1", "w2", "w3")):
            name = EXPERT.format(0, expert, matrix)
            tensors[name] = (tensors[name].float() * factor).clamp(-6e4, 6e4).half()
        if weight is not None:
            tensors[EXPERT.format(1, 0, "w2")][0, 0] = weight

    change_tensors(source, change)
    return source


def test_hidden_states_beyond_float16_are_no_broken_weights(tmp_path: Path) -> None:
    source = half(tmp_path / "model", factor=1e9)
    assert all(tensor.isfinite().all() for tensor in read_tensors(source).values())
    with pytest.raises(VerificationError) as caught:
        convert(source, options(source, 4))
    assert "overflow in float16 (largest 65504)" in caught.value.message
    assert caught.value.hint.startswith("convert the bfloat16 or float32 checkpoint")


def test_broken_weights_are_named_in_float16_as_well(tmp_path: Path) -> None:
    source = half(tmp_path / "model", factor=1, weight=float("inf"))
    with pytest.raises(VerificationError, match=r"layer 1\b.* not finite: the source holds broken weights"):
        convert(source, options(source, 4))
