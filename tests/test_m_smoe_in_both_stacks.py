"""M-SMoE on its own kind of model: dominant experts and groups are those of the paper, through encoder and decoder.

Recomputed here from the masks and logits of transformers' routers, as section 3.1 and algorithm 1 of arXiv 2310.01334
say: usage is normalised in each layer, the most used expert of each layer is dominant, as are the most used of all
layers together; every other expert joins the dominant one of the most similar router logits (cosine).
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoder_decoders import EXPERTS, MOE_LAYERS, SOURCE, TARGET, VOCABULARY, switch_model
from torch import Tensor

from hcsmoe_hub import CalibrationOptions, ConvertOptions, MethodOptions, Preset, convert
from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.report import LayerReport

KEPT = 3
SEQUENCES = 16


def calibration_ids() -> Tensor:
    """Sources and targets, one after the other: ``[B, S + T]``."""
    return torch.from_numpy(np.random.default_rng(5).integers(3, VOCABULARY, (SEQUENCES, SOURCE + TARGET)))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose routers drop many tokens."""
    folder = tmp_path_factory.mktemp("switch")
    switch_model(expert_capacity=3).save_pretrained(folder / "source")
    np.save(folder / "ids.npy", calibration_ids().numpy())
    return folder / "source"


def routed() -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """How often transformers routes a token to each expert, ``[E]``, and all router logits ``[T, E]``, by layer."""
    model = switch_model(expert_capacity=3)
    usage, logits = {}, {}

    def keep(layer: int) -> Any:
        def hook(_router: Any, _inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
            usage[layer], logits[layer] = output[0].sum(dim=(0, 1)), output[2].flatten(0, 1)

        return hook

    blocks = [*model.get_encoder().block, *model.get_decoder().block]
    for layer in MOE_LAYERS:
        blocks[layer].layer[-1].mlp.router.register_forward_hook(keep(layer))
    ids = calibration_ids()
    with torch.no_grad():
        model(input_ids=ids[:, :SOURCE], labels=ids[:, SOURCE:].contiguous(), use_cache=False)
    return usage, logits


def paper_groups(layers: tuple[int, ...]) -> dict[int, list[int]]:
    """The dominant expert that each expert follows, by layer."""
    usage, logits = routed()
    frequency = {layer: usage[layer] / usage[layer].sum() for layer in layers}
    for values in frequency.values():
        values[values.argmax()] = 1
    ranked = sorted(((-float(values[e]), layer, e) for layer, values in frequency.items() for e in range(EXPERTS)))
    dominant: dict[int, list[int]] = {layer: [] for layer in layers}
    for _, layer, expert in ranked[: KEPT * len(layers)]:
        dominant[layer].append(expert)
    found = {}
    for layer in layers:
        unit_TE = torch.nn.functional.normalize(logits[layer].double(), dim=0)
        similarity_EE = unit_TE.T @ unit_TE
        leaders = sorted(dominant[layer])
        follows = [leaders[int(similarity_EE[expert, leaders].argmax())] for expert in range(EXPERTS)]
        found[layer] = [expert if expert in leaders else follows[expert] for expert in range(EXPERTS)]
    return found


def converted(source: Path, output: Path, **method: Any) -> list[LayerReport]:
    options = ConvertOptions(
        experts=KEPT,
        method=MethodOptions(preset=Preset.M_SMOE, **method),
        output=output,
        device="cpu",
        calibration=CalibrationOptions(dataset=str(source.parent / "ids.npy"), source_length=SOURCE),
    )
    return convert(source, options).layers


def follows(layer: LayerReport) -> list[int]:
    """The dominant expert that each expert follows."""
    return [layer.dominant[label] for label in layer.labels]


def test_usage_is_that_of_the_routers_without_the_tokens_that_they_drop(source: Path, tmp_path: Path) -> None:
    usage, logits = routed()
    for layer in converted(source, tmp_path / "result"):
        assert layer.usage == usage[layer.layer].tolist()
        assert sum(layer.usage) < len(logits[layer.layer])


def test_dominant_experts_and_groups_are_those_of_the_paper(source: Path, tmp_path: Path) -> None:
    layers = converted(source, tmp_path / "result")
    assert {layer.layer: follows(layer) for layer in layers} == paper_groups(MOE_LAYERS)
    assert sum(layer.experts for layer in layers) == KEPT * len(MOE_LAYERS)


def test_the_first_encoder_layer_can_be_left_out_as_the_paper_does(source: Path, tmp_path: Path) -> None:
    first, *others = MOE_LAYERS
    layers = {layer.layer: layer for layer in converted(source, tmp_path / "result", layers=tuple(others))}
    assert layers[first].experts == EXPERTS
    assert {number: follows(layers[number]) for number in others} == paper_groups(tuple(others))


def test_a_number_that_is_not_an_moe_layer_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="4") as caught:
        converted(source, tmp_path / "result", layers=(4,))
    assert "1 to 5" in caught.value.message
