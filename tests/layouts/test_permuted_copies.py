"""Copies of experts whose neurons are in another order: merging them after alignment gives the originals back.

This is what M-SMoE (arXiv 2310.01334) aligns experts for: its models, Switch Transformers and NLLB-MoE, have ReLU
experts of two matrices, the second with biases. Gated experts are those of Mixtral.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoder_decoders import BUILDERS, EXPERTS, MOE_LAYERS, SOURCE, TARGET, VOCABULARY, logits, stored_experts
from tiny_models import build, change_tensors, options, read_tensors
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from hcsmoe_hub import CalibrationOptions, ConversionReport, ConvertOptions, MethodOptions, Preset, convert
from hcsmoe_hub.model.wrong_experts import run_chosen_experts
from hcsmoe_hub.options import Align, AlignTo, Layout

ORIGINALS = EXPERTS // 2
LINEARS = {"switch_transformers": ("wi", "wo"), "nllb-moe": ("fc1", "fc2")}


@torch.no_grad()
def with_copies(model: PreTrainedModel, model_type: str) -> PreTrainedModel:
    """Makes the last four experts copies of the first four, with shuffled neurons, and lets all of them be chosen."""
    generator = torch.Generator().manual_seed(3)
    for path, experts in model.named_modules():
        if path.endswith(".experts"):
            for number in range(ORIGINALS):
                original, duplicate = (experts.get_submodule(f"expert_{n}") for n in (number, ORIGINALS + number))
                _shuffle(original, duplicate, LINEARS[model_type], generator)
    run_chosen_experts(model)
    for layer in MOE_LAYERS:
        router = model.get_submodule(stored_routers(model)[layer])
        router.classifier.weight.copy_(_even_rows(_inputs_of(model, router)))
    return model


def _shuffle(original: Any, duplicate: Any, linears: tuple[str, str], generator: torch.Generator) -> None:
    """Copies an expert with its neurons in another order."""
    before, after = ([getattr(expert, name) for name in linears] for expert in (original, duplicate))
    order = torch.randperm(before[0].out_features, generator=generator)
    after[0].weight.copy_(before[0].weight[order])
    after[1].weight.copy_(before[1].weight[:, order])
    if before[0].bias is not None:
        after[0].bias.copy_(before[0].bias[order])
        after[1].bias.copy_(before[1].bias)


def stored_routers(model: PreTrainedModel) -> dict[int, str]:
    """Names of the routers, by layer."""
    names = [name for name, _ in model.named_modules() if name.endswith(".router")]
    return dict(zip(MOE_LAYERS, names, strict=True))


def calibration_ids() -> Tensor:
    """Sources and targets, one after the other: ``[B, S + T]``."""
    return torch.from_numpy(np.random.default_rng(0).integers(3, VOCABULARY, (64, SOURCE + TARGET)))


def _inputs_of(model: Any, router: nn.Module) -> Tensor:
    """What a router sees of the calibration text, ``[T, H]``."""
    seen: list[Tensor] = []
    handle = router.register_forward_pre_hook(lambda _router, inputs: seen.append(inputs[0].flatten(0, -2)))
    ids = calibration_ids()
    model(input_ids=ids[:, :SOURCE], labels=ids[:, SOURCE:].contiguous(), use_cache=False)
    handle.remove()
    return seen[0]


def _even_rows(inputs_TH: Tensor) -> Tensor:
    """Router rows that choose every original about as often as any other, and every copy now and then.

    The originals share the four quadrants of two directions in which tokens vary most. The rows of copies are shorter,
    and differ by further directions, which decide some tokens.
    """
    mean_H = nn.functional.normalize(inputs_TH.mean(dim=0), dim=0)
    centred_TH = inputs_TH - (inputs_TH @ mean_H)[:, None] * mean_H
    _, spread, direction_HH = torch.linalg.svd(centred_TH, full_matrices=False)
    unit_HH = direction_HH / spread[:, None] * len(inputs_TH) ** 0.5
    first_H, second_H = unit_HH[:2]
    rows = torch.stack([first_H + second_H, first_H - second_H, second_H - first_H, -first_H - second_H])
    return torch.cat([rows, 0.75 * rows + 0.3 * unit_HH[2 : 2 + ORIGINALS]])


@pytest.fixture(scope="module", params=BUILDERS)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of four experts and four shuffled copies, and token ids next to it."""
    folder = tmp_path_factory.mktemp(request.param)
    with_copies(BUILDERS[request.param](), request.param).save_pretrained(folder / "source")
    np.save(folder / "ids.npy", calibration_ids().numpy())
    return folder / "source"


def converted(source: Path, output: Path, **method: Any) -> ConversionReport:
    options = ConvertOptions(
        experts=ORIGINALS,
        method=MethodOptions(**{"layout": Layout.MAPPED, "align": Align.WEIGHT, **method}),
        output=output,
        device="cpu",
        calibration=CalibrationOptions(dataset=str(source.parent / "ids.npy"), source_length=SOURCE),
    )
    return convert(source, options)


def chosen(model: Any) -> Any:
    """The same model, running the experts that its router chooses."""
    run_chosen_experts(model)
    return model.eval()


def outputs_of(experts: Any, count: int) -> Tensor:
    """Outputs of the first experts for some random tokens, ``[K, 20, H]``."""
    tokens_TH = torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return torch.stack([experts[f"expert_{number}"](tokens_TH) for number in range(count)])


@pytest.mark.parametrize("align_to", AlignTo)
@pytest.mark.parametrize("preset", [Preset.M_SMOE, Preset.HC_SMOE])
def test_aligned_copies_become_the_originals_again(
    source: Path, tmp_path: Path, preset: Preset, align_to: AlignTo
) -> None:
    # The paper's anchor needs no option with its own preset.
    given = {} if (preset, align_to) == (Preset.M_SMOE, AlignTo.FIRST) else {"align_to": align_to}
    report = converted(source, tmp_path / "result", preset=preset, **given)
    assert report.method["align_to"] == align_to
    assert [layer.layer for layer in report.layers] == list(MOE_LAYERS)
    original = chosen(AutoModelForSeq2SeqLM.from_pretrained(source))
    merged = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "result", trust_remote_code=True).eval()
    before, after = stored_experts(original), stored_experts(merged)
    for layer in report.layers:
        assert layer.experts == ORIGINALS
        assert layer.labels[:ORIGINALS] == layer.labels[ORIGINALS:]
        expected = outputs_of(before[layer.layer], ORIGINALS)
        found = outputs_of(after[layer.layer], ORIGINALS)
        torch.testing.assert_close(found[layer.labels[:ORIGINALS]], expected, rtol=0, atol=1e-5)
        # Copies were used as well, so the merge was one.
        assert min(layer.usage[ORIGINALS:]) > 0
    torch.testing.assert_close(logits(merged), logits(original), rtol=0, atol=1e-4)


def test_a_merge_without_alignment_does_not(source: Path, tmp_path: Path) -> None:
    converted(source, tmp_path / "result", preset=Preset.M_SMOE, align=Align.NONE)
    original = chosen(AutoModelForSeq2SeqLM.from_pretrained(source))
    merged = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "result", trust_remote_code=True).eval()
    assert not torch.allclose(logits(merged), logits(original), atol=1e-2)


def shuffle_copies(tensors: dict[str, Tensor]) -> None:
    """Makes the last four experts of a Mixtral copies of the first four, with shuffled neurons."""
    name = "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"
    generator = torch.Generator().manual_seed(5)
    for layer, expert in ((layer, expert) for layer in range(2) for expert in range(ORIGINALS)):
        order = torch.randperm(len(tensors[name.format(layer, expert, "w1")]), generator=generator)
        for matrix, dim in (("w1", 0), ("w3", 0), ("w2", 1)):
            copied = tensors[name.format(layer, expert, matrix)].index_select(dim, order)
            tensors[name.format(layer, ORIGINALS + expert, matrix)] = copied


@pytest.mark.parametrize("align", [Align.WEIGHT, Align.ACTIVATION])
def test_copies_of_gated_experts_become_the_originals_again_in_any_order(tmp_path: Path, align: Align) -> None:
    source = build(tmp_path / "source")
    change_tensors(source, shuffle_copies)
    ids = torch.from_numpy(np.random.default_rng(1).integers(3, 64, (4, 16)))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(source).eval()(ids).logits
    for align_to in AlignTo:
        method = MethodOptions(preset=Preset.HC_SMOE, layout=Layout.FULL, align=align, align_to=align_to)
        report = convert(source, options(source, ORIGINALS, output=tmp_path / align_to, method=method))
        assert [layer.labels for layer in report.layers] == [[0, 1, 2, 3, 0, 1, 2, 3]] * 2
        with torch.no_grad():
            found = AutoModelForCausalLM.from_pretrained(tmp_path / align_to).eval()(ids).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    first, dominant = (read_tensors(tmp_path / align_to) for align_to in AlignTo)
    assert not all(torch.equal(first[name], dominant[name]) for name in first)
