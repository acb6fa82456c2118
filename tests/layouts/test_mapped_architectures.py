"""Every architecture: a mapped result computes what the full result computes, with the tensors of fewer experts."""

import json
from pathlib import Path

import pytest
import torch
from architectures import ENCODER_DECODER, EXPERTS, SUPPORTED, VOCABULARY, save_tiny
from mapped_models import example_maps, write_result
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from hcsmoe_hub.checkpoint import config_json
from hcsmoe_hub.checkpoint.config_json import MoESettings
from hcsmoe_hub.checkpoint.source import LocalSource
from hcsmoe_hub.model.skeleton import Skeleton
from hcsmoe_hub.model.source_model import SourceModel, read_model
from hcsmoe_hub.model.width import neurons_of
from hcsmoe_hub.options import Layout
from hcsmoe_hub.planning.expert_shape import ExpertShape
from hcsmoe_hub.planning.mapped_layout import mapped_refusal
from hcsmoe_hub.planning.result_shapes import edited_names, result_state
from hcsmoe_hub.result.verify import check_structure

# Its block runs every expert on inputs that the router has scaled: no experts are chosen by number.
REFUSED = "llama4_text"
# Encoder-decoder models, which transformers loads with another class, are in test_modules_of_experts.py.
# Not part of transformers' experts interface: it has one implementation of its own.
WITHOUT_INTERFACE = "dbrx"
KEPT = 3


def logits(model: PreTrainedModel, implementation: str) -> Tensor:
    """Logits of 24 tokens, with one of transformers' ways to compute experts."""
    if model.config.model_type != WITHOUT_INTERFACE:
        model.set_experts_implementation(implementation)
    ids = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(ids, use_cache=False).logits


def load(folder: Path) -> PreTrainedModel:
    """Loads a mapped result as a user would, and checks that every tensor found its place."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()), info
    return model


def shape_of(source: SourceModel) -> ExpertShape:
    """Experts as wide as those of the source."""
    return ExpertShape(experts=KEPT, width=neurons_of(source))


@pytest.mark.parametrize("model_type", [name for name in SUPPORTED if name not in (REFUSED, *ENCODER_DECODER)])
def test_mapped_result_computes_what_the_full_result_computes(model_type: str, tmp_path: Path) -> None:
    original = save_tiny(model_type, tmp_path / "source")
    source = read_model(LocalSource(tmp_path / "source"))
    maps = example_maps(source)
    full = type(original).from_pretrained(write_result(tmp_path / "source", tmp_path / "full", maps, mapped=False))
    mapped = load(write_result(tmp_path / "source", tmp_path / "mapped", maps, mapped=True))

    counts = {layer: max(row_map) + 1 for layer, row_map in maps.items()}
    expected = result_state(source, counts, Layout.MAPPED, shape_of(source))
    assert {name: tensor.shape for name, tensor in mapped.state_dict().items()} == {
        name: tensor.shape for name, tensor in expected.items()
    }
    for implementation in ("batched_mm", "eager"):
        assert torch.allclose(logits(mapped, implementation), logits(full, implementation), atol=5e-6, rtol=0)
    # Each token's experts are summed in the order of its choice, which a map does not change.
    exact = torch.equal(logits(mapped, "batched_mm"), logits(full, "batched_mm"))
    assert exact or model_type == WITHOUT_INTERFACE
    assert not torch.allclose(logits(mapped, "eager"), logits(original, "eager"), atol=1e-4)

    described = check_structure(tmp_path / "mapped")
    assert described.expert_map == {layer: tuple(row_map) for layer, row_map in maps.items()}
    assert (described.settings, described.blocks) == (source.settings, source.blocks)
    mapped.save_pretrained(tmp_path / "again")
    assert LocalSource(tmp_path / "again").tensors.keys() == described.source.tensors.keys()
    assert torch.equal(logits(load(tmp_path / "again"), "batched_mm"), logits(mapped, "batched_mm"))


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_names_and_shapes_of_a_result_follow_from_the_source(model_type: str, tmp_path: Path) -> None:
    save_tiny(model_type, tmp_path)
    source = read_model(LocalSource(tmp_path))
    assert (mapped_refusal(source) is None) == (model_type != REFUSED)
    reduced = Skeleton(with_experts(source, tmp_path, KEPT), source.skeleton.dtype)
    for layout in Layout:
        state = result_state(source, {block.layer: KEPT for block in source.blocks}, layout, shape_of(source))
        built = reduced if layout in (Layout.REDUCED, Layout.FACTORED) else source.skeleton
        routers = {tensor.name for block in source.blocks for tensor in block.router}
        same = state.keys() if layout is not Layout.MAPPED else routers
        assert {name: state[name].shape for name in same} == {name: built.state[name].shape for name in same}
        assert edited_names(source, layout) <= state.keys()
        for group in source.groups.values():
            names = set(group.targets.values()) & state.keys()
            found, expected = (
                skeleton.to_stored({name: state[name] for name in names}, group)
                for skeleton in (source.skeleton, reduced)
            )
            assert {name: tensor.shape for name, tensor in found.items()} == {
                name: tensor.shape for name, tensor in expected.items()
            }


def with_experts(source: SourceModel, folder: Path, experts: int) -> dict[str, object]:
    """The raw config of a source for another number of experts."""
    config = json.loads((folder / "config.json").read_text())
    after = MoESettings(experts=experts, experts_per_token=source.settings.experts_per_token)
    assert source.settings.experts == EXPERTS
    return config_json.edit(config, source.skeleton.config, source.settings, after)
