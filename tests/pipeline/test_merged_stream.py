"""Layers fitted on the hidden states that they will see in the reduced model, towards what the source's layers give."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import save_tiny, tiny_model
from tiny_models import build, differing, options, read_tensors, token_ids
from torch import Tensor, nn
from transformers import PreTrainedModel

from hcsmoe_hub import convert
from hcsmoe_hub import plan as plan_conversion
from hcsmoe_hub.checkpoint.reader import TensorReader
from hcsmoe_hub.checkpoint.tensors import StoredTensor
from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.options import Layout, Method, MethodOptions, Preset, Propagate, Refit, RouterPolicy
from hcsmoe_hub.pipeline.merged_stream import find_gain
from hcsmoe_hub.pipeline.streams import Part, Streams
from hcsmoe_hub.planning.estimate import estimate_needs
from hcsmoe_hub.recipe.resolve import resolve
from hcsmoe_hub.report import ConversionReport

IDS = token_ids(16, 32)
BATCH_TOKENS = 4 * IDS.shape[1]
# Where the routed output is added to the hidden states as it is, halved, and doubled.
ADDING = [
    "mixtral",
    "gpt_oss",
    "dbrx",
    "qwen3_next",
    "cohere2_moe",
    "minimax_m3_vl_text",
]
# Where a norm, a convolution or several copies of the hidden states come between.
NOT_ADDING = ["afmoe", "flex_olmo", "inkling2_text", "deepseek_v4", "gemma4_text"]
WARNING = "what earlier layers have changed is not made up for"


def method(propagate: Propagate, **others: Any) -> MethodOptions:
    """A method that fits down projections, or whatever else is given."""
    return MethodOptions(preset=Preset.HC_SMOE, propagate=propagate, **(others or {"refit": Refit.DOWN}))


def run(source: Path, propagate: Propagate, experts: int = 3, *, ids: Tensor = IDS, **others: Any) -> ConversionReport:
    """Converts to a folder named after the choice."""
    wanted = options(
        source,
        experts,
        ids=ids,
        output=source.parent / propagate,
        batch_tokens=BATCH_TOKENS,
        method=method(propagate, **others),
    )
    return convert(source, wanted)


def hidden(output: Any) -> Tensor:
    """The hidden states among what a layer returns."""
    states = output if isinstance(output, Tensor) else output[0]
    assert isinstance(states, Tensor)
    return states


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers of a plain model."""
    names = ("layers", "blocks")
    return next(
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] in names
    )


def layer_outputs(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """What leaves each decoder layer of a plain model."""
    found: list[Tensor] = []
    for layer in decoder_layers(model):
        layer.register_forward_hook(lambda _module, _inputs, output: found.append(hidden(output)))
    with torch.no_grad():
        model.base_model(ids, use_cache=False)
    return found


@contextmanager
def recording(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Remembers what leaves each layer of a conversion, of the source and of the reduced model."""
    found: list[tuple[Tensor, Tensor]] = []
    together = Streams.join

    def remember(streams: Streams, outputs: Mapping[Part, Any]) -> Any:
        found.append((hidden(outputs[Part.SOURCE]), hidden(outputs[Part.REDUCED])))
        return together(streams, outputs)

    with monkeypatch.context() as patch:
        patch.setattr(Streams, "join", remember)
        yield found


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative distance of two tensors."""
    return float((found - expected).norm() / expected.norm())


# What it is for


def distances(model_type: str, source: Path, ids: Tensor, text: Tensor) -> dict[Propagate, float]:
    """How far from the source's the last hidden states of both results are."""
    model = save_tiny(model_type, source)
    expected, found = layer_outputs(model, text)[-1], {}
    for propagate in Propagate:
        assert run(source, propagate, ids=ids).warnings == []
        result = type(model).from_pretrained(source.parent / propagate).eval()
        found[propagate] = distance(layer_outputs(result, text)[-1], expected)
    return found


@pytest.mark.parametrize("model_type", ADDING)
def test_the_result_ends_nearer_to_the_source_on_the_text_it_is_fitted_on(tmp_path: Path, model_type: str) -> None:
    ids = token_ids(64, 32)
    found = distances(model_type, tmp_path / "model", ids, ids)
    assert found[Propagate.MERGED] < 0.98 * found[Propagate.ORIGINAL]


@pytest.mark.parametrize("model_type", ["gpt_oss", "minimax_m3_vl_text"])
def test_with_enough_text_the_result_ends_nearer_to_the_source_on_other_text(tmp_path: Path, model_type: str) -> None:
    other = torch.randint(1, 64, (8, 32), generator=torch.Generator().manual_seed(2))
    found = distances(model_type, tmp_path / "model", token_ids(128, 32), other)
    assert found[Propagate.MERGED] < 0.99 * found[Propagate.ORIGINAL]


@pytest.mark.parametrize("router", [RouterPolicy.FIT, RouterPolicy.DOMINANT])
def test_only_layers_behind_the_first_converted_one_are_fitted_otherwise(tmp_path: Path, router: RouterPolicy) -> None:
    source = build(tmp_path / "model", "mixtral", num_hidden_layers=3)
    fitted = {"router": router, "refit": Refit.NONE if router is RouterPolicy.FIT else Refit.DOWN}
    reports = {propagate: run(source, propagate, 4, **fitted) for propagate in Propagate}
    before, after = (read_tensors(source.parent / propagate) for propagate in Propagate)
    kind = "gate.weight" if router is RouterPolicy.FIT else "w2.weight"
    changed = differing(before, after)
    assert {name.split(".")[2] for name in changed} <= {"1", "2"}
    assert "1" in {name.split(".")[2] for name in changed}
    assert all(name.endswith(kind) for name in changed)
    for one, other in zip(reports[Propagate.ORIGINAL].layers, reports[Propagate.MERGED].layers, strict=True):
        # Experts are compared and chosen by what they do in the source.
        assert (one.labels, one.usage, one.saliency) == (other.labels, other.usage, other.saliency)
        assert one.measured_tokens == other.measured_tokens == IDS.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_as_many_experts_as_before_give_every_tensor_back(tmp_path: Path, dtype: torch.dtype) -> None:
    source = build(tmp_path / "model", "deepseek_v3", dtype=dtype, num_hidden_layers=4)
    report = run(source, Propagate.MERGED, 8)
    assert differing(read_tensors(source.parent / "merged"), read_tensors(source)) == []
    assert all(layer.output_error == 0 for layer in report.layers)


# Both sets of hidden states


@pytest.mark.parametrize("model_type", [*ADDING, *NOT_ADDING, "zaya", "nemotron_h", "hy_v4", "deepseek_v3"])
def test_every_layer_sees_what_it_will_see_in_the_result(
    tmp_path: Path, model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny(model_type, tmp_path / "model")
    with recording(monkeypatch) as streams:
        run(tmp_path / "model", Propagate.MERGED)
    result = type(model).from_pretrained(tmp_path / "merged").eval()
    for which, plain in enumerate((model, result)):
        expected = layer_outputs(plain, IDS)
        assert len(expected) == len(streams) > 1
        for found, wanted in zip(streams, expected, strict=True):
            torch.testing.assert_close(found[which], wanted, rtol=1e-4, atol=1e-5)
    assert distance(streams[-1][1], streams[-1][0]) > 0.01


@pytest.mark.parametrize("shape", [(1, 16), (8, 16), (16, 16), (3, 20)], ids=str)
def test_any_number_of_sequences_can_travel_twice(
    tmp_path: Path, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = save_tiny("qwen2_moe", tmp_path / "model"), token_ids(*shape)
    with recording(monkeypatch) as streams:
        run(tmp_path / "model", Propagate.MERGED, ids=ids)
    result = type(model).from_pretrained(tmp_path / "merged").eval()
    for which, plain in enumerate((model, result)):
        for found, wanted in zip(streams, layer_outputs(plain, ids), strict=True):
            torch.testing.assert_close(found[which], wanted, rtol=1e-4, atol=1e-5)


def test_nothing_is_computed_twice_before_the_first_converted_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = build(tmp_path / "model", "deepseek_v3", num_hidden_layers=4, first_k_dense_replace=2)
    with recording(monkeypatch) as streams:
        run(source, Propagate.MERGED, 4)
    assert [torch.equal(*states) for states in streams] == [True, True, False, False]


def test_every_weight_byte_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = build(tmp_path / "model", "deepseek_v3")
    read, names = TensorReader.read, list[str]()

    def counting(reader: TensorReader, tensor: StoredTensor, into: Tensor | None = None) -> Tensor:
        names.append(tensor.name)
        return read(reader, tensor, into)

    monkeypatch.setattr(TensorReader, "read", counting)
    run(source, Propagate.MERGED, 4)
    assert sorted(names) == sorted(read_tensors(source))


def test_the_second_set_of_hidden_states_is_planned_for(tmp_path: Path) -> None:
    source = build(tmp_path / "model")
    plans = {
        propagate: plan_conversion(source, options(source, 4, ids=IDS, method=method(propagate)))
        for propagate in Propagate
    }
    needs = {propagate: estimate_needs(plan) for propagate, plan in plans.items()}
    states = 4 * IDS.numel() * 32 * torch.float32.itemsize
    assert needs[Propagate.MERGED].memory_bytes == needs[Propagate.ORIGINAL].memory_bytes + states
    assert needs[Propagate.MERGED].flops > needs[Propagate.ORIGINAL].flops
    assert needs[Propagate.MERGED].disk_bytes == needs[Propagate.ORIGINAL].disk_bytes


# Whether a layer adds


@pytest.mark.parametrize("model_type", NOT_ADDING)
def test_layers_that_do_more_than_add_are_fitted_to_the_outputs_in_the_source(tmp_path: Path, model_type: str) -> None:
    save_tiny(model_type, tmp_path / "model")
    warnings = run(tmp_path / "model", Propagate.MERGED).warnings
    # vLLM starts DeepSeek-V4 with certain numbers of experts only, and Inkling cannot be continued: other warnings.
    assert sum(WARNING in warning for warning in warnings) == 1
    others = [warning for warning in warnings if WARNING not in warning]
    assert all("vLLM" in warning or "cannot be continued" in warning for warning in others)


def test_a_fit_of_the_router_alone_asks_for_no_outputs(tmp_path: Path) -> None:
    save_tiny("flex_olmo", tmp_path / "model")
    assert run(tmp_path / "model", Propagate.MERGED, router=RouterPolicy.FIT).warnings == []


@pytest.mark.parametrize(("model_type", "warnings"), [("mixtral", 0), ("cohere2_moe", 0), ("flex_olmo", 1)])
def test_rounding_to_bfloat16_is_not_taken_for_a_norm(tmp_path: Path, model_type: str, warnings: int) -> None:
    tiny_model(model_type).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    assert len(run(tmp_path / "model", Propagate.MERGED).warnings) == warnings


def made_up(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Hidden states ``[1, T, H]``, and noise of another size for every token."""
    generator = torch.Generator().manual_seed(0)
    size_T1 = torch.rand(64, 1, generator=generator) + 0.1
    values_TH = size_T1 * torch.randn(64, 32, generator=generator)
    return torch.randn(1, 64, 32, generator=generator).to(dtype), values_TH.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gain", [1.0, 0.22, -3.0])
def test_what_a_routed_output_is_multiplied_by_is_found(dtype: torch.dtype, gain: float) -> None:
    silent, values_TH = made_up(dtype)
    assert find_gain(silent + gain * values_TH, silent, values_TH) == pytest.approx(gain, rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_norm_has_no_gain(dtype: torch.dtype) -> None:
    silent, values_TH = made_up(dtype)
    normed_TH = torch.nn.functional.rms_norm(values_TH.float(), (32,)).to(dtype)
    assert find_gain(silent + normed_TH, silent, values_TH) is None


def test_what_does_not_reach_the_output_or_reaches_several_has_no_gain() -> None:
    silent, values_TH = made_up(torch.float32)
    assert find_gain(silent, silent, values_TH) is None
    several = silent[..., None, :].expand(-1, -1, 2, -1)
    assert find_gain(several + values_TH[:, None], several, values_TH) is None


# Refusals


@pytest.mark.parametrize(
    "others", [{"refit": Refit.NONE}, {"layout": Layout.MAPPED}, {"layout": Layout.FULL}, {"method": Method.PRUNE}]
)
def test_without_a_fit_there_is_nothing_to_choose(others: dict[str, Any]) -> None:
    assert resolve(MethodOptions(preset=Preset.HC_SMOE, **others)).propagate is None
    for propagate in Propagate:
        with pytest.raises(PlanError) as caught:
            resolve(MethodOptions(preset=Preset.HC_SMOE, propagate=propagate, **others))
        assert caught.value.message.startswith(f"`propagate='{propagate}'` would have no effect: ")
        assert caught.value.hint == "leave `propagate` out"


@pytest.mark.parametrize("way", Method)
@pytest.mark.parametrize("fit", [*({"refit": what} for what in list(Refit)[1:]), {"router": RouterPolicy.FIT}])
def test_whatever_is_fitted_is_fitted_on_the_original_hidden_states_unless_asked(
    way: Method, fit: dict[str, Any]
) -> None:
    assert resolve(MethodOptions(preset=Preset.HC_SMOE, method=way, **fit)).propagate is Propagate.ORIGINAL
    assert resolve(MethodOptions(preset=Preset.HC_SMOE, method=way, propagate=Propagate.MERGED, **fit)).propagates
