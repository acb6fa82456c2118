"""The mapped layout: what the map means, what becomes of it in a model's life, and what is refused."""

import ast
import copy
import json
import pickle
import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import VOCABULARY, save_tiny, tiny_config, tiny_model
from mapped_models import example_maps, write_result
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
)

from hcsmoe_hub.checkpoint.config_json import plain_config
from hcsmoe_hub.checkpoint.modeling_hcsmoe import expert_modules, tie_experts
from hcsmoe_hub.checkpoint.source import LocalSource
from hcsmoe_hub.errors import PlanError, SourceError
from hcsmoe_hub.model.source_model import SourceModel, read_model
from hcsmoe_hub.planning.mapped_layout import CODE, mapped_config, mapped_refusal

ROW_MAPS = {0: [0, 1, 0, 2, 1, 0], 1: [0, 0, 0, 0, 1, 1]}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SourceModel:
    """A tiny Mixtral of six experts."""
    folder = tmp_path_factory.mktemp("mapped") / "source"
    save_tiny("mixtral", folder)
    return read_model(LocalSource(folder))


@pytest.fixture(scope="module")
def folder(source: SourceModel) -> Path:
    """Its mapped result, three experts in the first layer and two in the second."""
    assert source.source.path is not None
    return write_result(source.source.path, source.source.path.parent / "mapped", ROW_MAPS, mapped=True)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> PreTrainedModel:
    """The loaded result."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    return model.eval()


def logits(model: Any, *, seed: int = 0) -> Tensor:
    ids = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(ids).logits


# What the map means


def test_rows_become_experts_and_no_expert_stays_no_expert() -> None:
    model = tiny_model("mixtral")
    tie_experts(model, ROW_MAPS)
    experts = expert_modules(model)[0]
    seen: list[Tensor] = []
    experts.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[1]))
    tokens_TH, weight_TK = torch.ones(4, 32), torch.tensor([[1.0, 0.5]] * 3 + [[1.0, 0.0]])
    row_TK = torch.tensor([[0, 2], [5, 3], [4, 1], [3, 6]])
    experts(tokens_TH, row_TK, weight_TK)
    # Row 6 is the first beyond the router's six, and expert 3 the first beyond the layer's three.
    assert seen[0].tolist() == [[0, 0], [0, 2], [1, 1], [2, 3]]
    assert row_TK.tolist() == [[0, 2], [5, 3], [4, 1], [3, 6]]


def test_a_token_that_chooses_two_members_of_a_cluster_gets_both_weights() -> None:
    model = tiny_model("mixtral")
    tie_experts(model, ROW_MAPS)
    experts = expert_modules(model)[0]
    tokens_TH = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    both = experts(tokens_TH, torch.tensor([[0, 5]] * 5), torch.tensor([[0.75, 0.25]] * 5))
    once = experts(tokens_TH, torch.tensor([[2, 1]] * 5), torch.tensor([[1.0, 0.0]] * 5))
    assert torch.allclose(both, once, atol=1e-6)


def test_experts_are_cut_and_counted_and_the_router_keeps_its_rows() -> None:
    model = tiny_model("mixtral")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    tie_experts(model, ROW_MAPS)
    for layer, count in ((0, 3), (1, 2)):
        experts = expert_modules(model)[layer]
        name = f"model.layers.{layer}.mlp.experts.gate_up_proj"
        assert experts.num_experts == count
        assert torch.equal(experts.gate_up_proj, before[name][:count])
        assert experts.gate_up_proj.untyped_storage().nbytes() == experts.gate_up_proj.nbytes
        assert model.model.layers[layer].mlp.gate.weight.shape[0] == 6
    assert model.state_dict().keys() == before.keys()


# A model's life


def deep_copied(model: Any) -> Any:
    return copy.deepcopy(model)


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("change", [deep_copied, pickled, compiled])
def test_the_map_survives(loaded: PreTrainedModel, change: Callable[[Any], Any]) -> None:
    assert torch.allclose(logits(change(loaded)), logits(loaded), atol=1e-6)


def test_the_map_is_no_tensor_of_the_checkpoint_and_no_weight(loaded: PreTrainedModel) -> None:
    assert not [name for name in loaded.state_dict() if "row" in name]
    half = copy.deepcopy(loaded).to(torch.bfloat16)
    maps = {layer: experts.expert_of_row for layer, experts in expert_modules(half).items()}
    assert {layer: row_map.tolist() for layer, row_map in maps.items()} == ROW_MAPS
    assert {row_map.dtype for row_map in maps.values()} == {torch.int64}


def test_a_model_that_is_spread_over_memory_and_disk_computes_the_same(
    folder: Path, loaded: PreTrainedModel, tmp_path: Path
) -> None:
    parts = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    places = {**dict.fromkeys(parts, "cpu"), "model.layers.1": "disk"}
    spread = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, device_map=places, offload_folder=tmp_path
    )
    assert torch.allclose(logits(spread), logits(loaded), atol=1e-6)


def test_a_model_of_random_weights_can_be_built_from_the_config(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    assert type(model).__name__ == "MappedMixtralForCausalLM"
    assert [experts.down_proj.shape[0] for experts in expert_modules(model).values()] == [3, 2]
    assert logits(model).isfinite().all()


def test_the_class_of_the_source_does_not_load_it_silently(folder: Path) -> None:
    for loader in (AutoModelForCausalLM, MixtralForCausalLM):
        with pytest.raises(RuntimeError, match="mismatched"):
            loader.from_pretrained(folder)


def test_the_language_model_of_a_multimodal_checkpoint_can_be_mapped(tmp_path: Path) -> None:
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    sizes = {"patch_size": 4, "spatial_merge_size": 1, "temporal_patch_size": 1, "num_position_embeddings": 16}
    text = tiny_config("qwen3_5_moe_text").to_dict()
    config = Qwen3_5MoeConfig(text_config=text, vision_config={**vision, **sizes})
    Qwen3_5MoeForConditionalGeneration(config).save_pretrained(tmp_path / "source")
    maps = example_maps(read_model(LocalSource(tmp_path / "source")))
    results = [
        AutoModelForCausalLM.from_pretrained(
            write_result(tmp_path / "source", tmp_path / str(mapped), maps, mapped=mapped),
            trust_remote_code=mapped,
            experts_implementation="batched_mm",
        )
        for mapped in (True, False)
    ]
    assert isinstance(results[0], Qwen3_5MoeForConditionalGeneration)
    assert torch.equal(*(logits(model) for model in results))


# What is written


def test_the_config_changes_by_the_map_and_the_class_only(source: SourceModel) -> None:
    raw = {**source.source.config, "auto_map": {"AutoConfig": "configuration_foreign.ForeignConfig"}}
    before = copy.deepcopy(raw)
    config = mapped_config(raw, source, ROW_MAPS)
    assert raw == before
    assert config.pop("architectures") == ["MappedMixtralForCausalLM"]
    # Agreeing to run the modelling file must not run anything else.
    assert config.pop("auto_map") == {"AutoModelForCausalLM": "modeling_hcsmoe.MappedMixtralForCausalLM"}
    described = {"layout": "mapped", "expert_map": {"0": ROW_MAPS[0], "1": ROW_MAPS[1]}}
    assert config["hcsmoe"] == described
    assert plain_config(config) == {key: raw[key] for key in raw if key not in ("architectures", "auto_map")}
    assert json.loads(json.dumps(config)) == config


def test_the_modelling_file_stands_alone(source: SourceModel, tmp_path: Path) -> None:
    text = CODE.source(source)
    modules = set()
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Import(names):
                modules |= {alias.name.partition(".")[0] for alias in names}
            case ast.ImportFrom(module, _, level):
                assert level == 0
                modules.add(str(module).partition(".")[0])
    assert modules - set(sys.stdlib_module_names) == {"torch", "transformers"}
    (tmp_path / "alone.py").write_text(text)
    spec = spec_from_file_location("alone", tmp_path / "alone.py")
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(alone := module_from_spec(spec))
    assert issubclass(alone.MappedMixtralForCausalLM, MixtralForCausalLM)


def test_a_mapped_result_describes_itself_as_its_source_would(folder: Path, source: SourceModel) -> None:
    model = read_model(LocalSource(folder))
    assert CODE.source(model) == CODE.source(source) == (folder / "modeling_hcsmoe.py").read_text()
    assert model.expert_map == {0: (0, 1, 0, 2, 1, 0), 1: (0, 0, 0, 0, 1, 1)}
    assert source.expert_map is None
    # Matrices of 7 experts less, in float32: 12 experts were stored, 5 are.
    assert model.expert_parameters() * 12 == source.expert_parameters() * 5


# What is refused


@pytest.mark.parametrize(
    "maps",
    [
        {0: ROW_MAPS[0]},
        {**ROW_MAPS, 2: ROW_MAPS[0]},
        {**ROW_MAPS, 1: [0, 1, 0]},
        {**ROW_MAPS, 1: [0, 2, 0, 2, 0, 0]},
        {**ROW_MAPS, 1: [1, 2, 1, 2, 1, 1]},
        {**ROW_MAPS, 1: [0, -1, 0, 0, 0, 0]},
    ],
    ids=["missing_layer", "unknown_layer", "too_short", "gap", "from_one", "negative"],
)
def test_a_map_that_does_not_fit_is_refused(source: SourceModel, maps: dict[int, list[int]]) -> None:
    with pytest.raises(PlanError, match=r"map \[.*\] of layer \d") as caught:
        mapped_config(source.source.config, source, maps)
    assert caught.value.hint


@pytest.mark.parametrize(
    "section",
    [
        [],
        {},
        {"layout": "full", "expert_map": {"0": ROW_MAPS[0], "1": ROW_MAPS[1]}},
        {"layout": "mapped"},
        {"layout": "mapped", "expert_map": {"0": ROW_MAPS[0]}},
        {"layout": "mapped", "expert_map": {"0": ROW_MAPS[0], "one": ROW_MAPS[1]}},
        {"layout": "mapped", "expert_map": {"0": ROW_MAPS[0], "1": "000011"}},
        {"layout": "mapped", "expert_map": {"0": ROW_MAPS[0], "1": [0, 0, 0, 0, 1, True]}},
        {"layout": "mapped", "expert_map": {"0": ROW_MAPS[0], "1": [0, 0, 0, 0, 2, 2]}},
        {"layout": "mapped", "expert_map": {"0": ROW_MAPS[0], "1": [0, 0, 0, 1, 1]}},
        {"layout": "mapped", "expert_map": {"0": ROW_MAPS[0], "1": [0, 0, 0, 0, 1, 2]}},
    ],
)
def test_a_config_whose_map_is_damaged_is_a_known_failure(source: SourceModel, folder: Path, section: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    checkpoint = LocalSource(folder)
    checkpoint.config = {**config, "hcsmoe": section}
    with pytest.raises(SourceError) as caught:
        read_model(checkpoint)
    assert caught.value.hint


def test_a_model_whose_router_scales_inputs_is_refused(tmp_path: Path) -> None:
    save_tiny("llama4_text", tmp_path)
    model = read_model(LocalSource(tmp_path))
    reason = mapped_refusal(model)
    assert reason is not None
    assert "Llama4TextExperts of layer 0" in reason
    with pytest.raises(PlanError, match="Llama4TextExperts") as caught:
        mapped_config(model.source.config, model, {})
    assert "`layout='full'`" in caught.value.hint
