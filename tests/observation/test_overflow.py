"""Values that overflow are distinguished from broken weights."""

from itertools import product
from pathlib import Path

import pytest
import torch
from tiny_models import VOCABULARY, build, change_tensors, options, read_tensors, token_ids
from torch import Tensor

from hcsmoe_hub import convert
from hcsmoe_hub.errors import VerificationError
from hcsmoe_hub.machine.finite import are_finite
from hcsmoe_hub.model.skeleton import Broken
from hcsmoe_hub.observation.overflow import check_result, not_finite, overflow_hint
from hcsmoe_hub.options import MethodOptions, Preset

EXPERT = "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"
FINITE, INFINITE = torch.ones(4), torch.tensor([1.0, float("nan")])
BROKEN = Broken(name="layers.3.w1", layer=3, parameter="layers.3.gate_up")


@pytest.mark.parametrize(
    ("dtype", "broken", "inputs", "said"),
    [
        (
            torch.float16,
            [BROKEN],
            FINITE,
            "not finite: the source's tensor 'layers.3.w1' holds NaN or infinite numbers.",
        ),
        (torch.bfloat16, [BROKEN], INFINITE, "the source's tensor 'layers.3.w1' holds NaN or infinite numbers."),
        (torch.float16, [], FINITE, "weights up to here are: values overflow in float16 (largest 65504)."),
        (torch.bfloat16, [], FINITE, "weights up to here are: values overflow in bfloat16 (largest 3.3895e+38)."),
        (
            torch.float16,
            [],
            INFINITE,
            "an earlier layer have overflowed, as values overflow in float16 (largest 65504).",
        ),
    ],
)
def test_the_cause_follows_from_weights_and_inputs(
    dtype: torch.dtype, broken: list[Broken], inputs: Tensor, said: str
) -> None:
    error = not_finite("layer 3: the outputs are", broken=broken, dtype=dtype, inputs=[inputs])
    assert error.message.startswith("layer 3: the outputs are not finite")
    assert said in error.message
    assert ("publisher" in error.hint) == bool(broken)


def test_infinite_numbers_are_not_finite_and_nothing_is() -> None:
    assert not are_finite(torch.tensor([1.0, float("-inf")]))
    assert are_finite(torch.empty(0), torch.arange(3), torch.ones(3).to(torch.float8_e4m3fn))
    assert not are_finite(torch.ones(1), torch.tensor([float("nan")]).to(torch.float8_e4m3fn))
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
    with pytest.raises(
        VerificationError, match=r"layer 1\b.* not finite: the source's tensor '.*1.*experts.0.w2.weight'"
    ):
        convert(source, options(source, 4))


def test_a_tensor_of_the_result_that_is_not_finite_is_named_with_its_layer() -> None:
    check_result(2, {"a": FINITE, "b": FINITE})
    with pytest.raises(VerificationError, match=r"^layer 2: b is not finite, although .* overflow in float32"):
        check_result(2, {"a": FINITE, "b": INFINITE})


def test_broken_weights_are_named_before_they_reach_any_token(tmp_path: Path) -> None:
    # Router rows far below the others': the expert has no token, and REAP would drop it unseen.
    source = build(tmp_path / "model")
    name = EXPERT.format(1, 5, "w3")

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name][3, 3] = float("nan")

    change_tensors(source, change)
    with pytest.raises(VerificationError, match=rf"layer 1\b.*'{name}' holds NaN") as caught:
        convert(source, options(source, 4, method=MethodOptions(preset=Preset.REAP)))
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("part", ["input_layernorm", "self_attn.q_proj"])
@pytest.mark.parametrize("preset", [None, *Preset])
def test_broken_weights_before_the_experts_are_named_with_every_preset(
    tmp_path: Path, part: str, preset: Preset | None
) -> None:
    source, name = build(tmp_path / "model"), f"model.layers.1.{part}.weight"
    change_tensors(source, lambda tensors: tensors[name].view(-1)[0].fill_(float("inf")))
    with pytest.raises(VerificationError, match=rf"layer 1\b.*'{name}' holds NaN or infinite numbers"):
        convert(source, options(source, 4, method=MethodOptions(preset=preset)))


def test_a_broken_embedding_that_text_reaches_ends_the_conversion(tmp_path: Path) -> None:
    source, name = build(tmp_path / "model"), "model.embed_tokens.weight"
    change_tensors(source, lambda tensors: tensors[name][int(token_ids()[0, 0])].fill_(float("nan")))
    with pytest.raises(VerificationError, match=rf"layer 0\b.*'{name}' holds NaN or infinite numbers"):
        convert(source, options(source, 4))


def test_a_broken_row_that_no_token_reaches_is_copied_with_a_warning(tmp_path: Path) -> None:
    source, name = build(tmp_path / "model"), "model.embed_tokens.weight"
    unused = next(token for token in range(VOCABULARY) if token not in token_ids())
    change_tensors(source, lambda tensors: tensors[name][unused].fill_(float("nan")))
    report = convert(source, options(source, 4))
    assert report.warnings == [f"{name} holds NaN or infinite numbers, which are copied as they are."]
