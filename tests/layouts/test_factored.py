"""The factored layout: what factors compute, what becomes of them in a model's life, and what is refused."""

import ast
import copy
import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import VOCABULARY, save_tiny, tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, MixtralForCausalLM, PreTrainedModel

from hcsmoe_hub.checkpoint.modeling_hcsmoe_factored import (
    INCOMING,
    OUTGOING,
    FactorSizes,
    experts_modules,
    factor_experts,
    product,
)
from hcsmoe_hub.checkpoint.source import LocalSource
from hcsmoe_hub.errors import SourceError
from hcsmoe_hub.model.source_model import SourceModel, read_model
from hcsmoe_hub.planning.factored_layout import CODE, factored_config, factored_refusal

SIZES = FactorSizes(rank=3, incoming_rows=4, outgoing_rows=5)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SourceModel:
    """A tiny Mixtral of six experts."""
    folder = tmp_path_factory.mktemp("factored") / "source"
    save_tiny("mixtral", folder)
    return read_model(LocalSource(folder))


@pytest.fixture(scope="module")
def folder(source: SourceModel) -> Path:
    """The same with experts of random factors."""
    assert source.source.path is not None
    folder = source.source.path.parent / "factored"
    folder.mkdir()
    model = tiny_model("mixtral")
    torch.manual_seed(0)
    factor_experts(model, SIZES)
    shards = source.source.path.glob("*.safetensors")
    stored = {name: tensor for shard in shards for name, tensor in load_file(shard).items() if ".experts." not in name}
    factors = {name: tensor for name, tensor in model.state_dict().items() if ".experts." in name}
    save_file({**stored, **factors}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(factored_config(source.source.config, source, SIZES)))
    (folder / CODE.file).write_text(CODE.source(source))
    return folder


@pytest.fixture(scope="module")
def loaded(folder: Path) -> PreTrainedModel:
    """The loaded result."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()), info
    model.eval()
    return model


def logits(model: Any) -> Tensor:
    ids = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(ids).logits


# What factors compute


def dense(experts: Any, place: str, expert: int, part: int) -> Tensor:
    """``U V + S`` as one matrix, by a product with every unit vector."""
    inputs = getattr(experts, f"{place}_v").shape[-1]
    return product(experts, place, expert, part, torch.eye(inputs)).T


def test_a_product_with_factors_is_one_with_the_matrix_that_they_stand_for() -> None:
    model = tiny_model("mixtral")
    factor_experts(model, SIZES)
    experts = next(iter(experts_modules(model).values()))
    left, right = experts.outgoing_u[1, 0], experts.outgoing_v[1, 0]
    expected = left @ right
    rows = experts.outgoing_rows[1, 0].tolist()
    assert rows == list(range(5))
    expected[rows] += experts.outgoing_s[1, 0]
    assert torch.allclose(dense(experts, OUTGOING, 1, 0), expected, atol=1e-6)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "gpt_oss", "nemotron_h", "dbrx"])
def test_factored_experts_compute_what_experts_with_their_matrices_do(model_type: str) -> None:
    whole = tiny_model(model_type).eval()
    factored = copy.deepcopy(whole)
    factor_experts(factored, SIZES)
    for name, experts in experts_modules(factored).items():
        original: Any = whole.get_submodule(name)
        for expert in range(original.num_experts):
            incoming = [dense(experts, INCOMING, expert, part) for part in range(experts.incoming_u.shape[1])]
            _write(original, expert, incoming, dense(experts, OUTGOING, expert, 0))
    assert torch.allclose(logits(factored), logits(whole), atol=1e-5)


@torch.no_grad()
def _write(original: Any, expert: int, incoming: list[Tensor], outgoing: Tensor) -> None:
    """Writes the matrices of one expert as transformers holds them."""
    if type(original).__name__ == "DbrxExperts":
        width = original.ffn_hidden_size
        rows = slice(expert * width, (expert + 1) * width)
        for name, matrix in zip(("w1", "v1", "w2"), (*incoming, outgoing.T), strict=True):
            getattr(original.mlp, name)[rows] = matrix
        return
    joined = torch.cat(incoming) if original.is_concatenated else torch.stack(incoming, 1).flatten(0, 1)
    name = "gate_up_proj" if original.has_gate else "up_proj"
    getattr(original, name)[expert] = joined.T if original.is_transposed else joined
    original.down_proj[expert] = outgoing.T if original.is_transposed else outgoing


def test_a_choice_beyond_the_experts_is_no_expert() -> None:
    model = tiny_model("mixtral")
    factor_experts(model, SIZES)
    experts = next(iter(experts_modules(model).values()))
    tokens_TH = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    both = experts(tokens_TH, torch.tensor([[2, 6]] * 3), torch.tensor([[1.0, 0.5]] * 3))
    once = experts(tokens_TH, torch.tensor([[2]] * 3), torch.tensor([[1.0]] * 3))
    assert torch.equal(both, once)
    assert both.any()


# A model's life


def deep_copied(model: Any) -> Any:
    return copy.deepcopy(model)


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("change", [deep_copied, pickled])
def test_copies_compute_with_factors_of_their_own(loaded: PreTrainedModel, change: Callable[[Any], Any]) -> None:
    changed = change(loaded)
    assert torch.equal(logits(changed), logits(loaded))
    with torch.no_grad():
        for experts in experts_modules(changed).values():
            experts.incoming_v.zero_()
    assert not torch.allclose(logits(changed), logits(loaded))


def test_factors_are_weights_and_the_numbers_of_rows_are_not(loaded: PreTrainedModel) -> None:
    half = copy.deepcopy(loaded).to(torch.bfloat16)
    kinds = {name: tensor.dtype for name, tensor in half.state_dict().items() if ".experts." in name}
    assert {dtype for name, dtype in kinds.items() if name.endswith("_rows")} == {torch.int32}
    assert {dtype for name, dtype in kinds.items() if not name.endswith("_rows")} == {torch.bfloat16}
    assert not [name for name in kinds if name.endswith("_proj")]


def test_it_is_saved_and_loaded_again(loaded: PreTrainedModel, folder: Path, tmp_path: Path) -> None:
    loaded.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert torch.equal(logits(again.eval()), logits(loaded))


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
    assert type(model).__name__ == "FactoredMixtralForCausalLM"
    assert logits(model).isfinite().all()


def test_gradients_reach_the_factors(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model(torch.arange(3, 15)[None]).logits.square().sum().backward()
    experts = next(iter(experts_modules(model).values()))
    parts = [getattr(experts, f"{place}_{part}") for place in (INCOMING, OUTGOING) for part in "uvs"]
    assert all(part.grad.any() for part in parts)


def test_the_class_of_the_source_does_not_load_it_silently(folder: Path) -> None:
    _, info = MixtralForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert info["missing_keys"]
    assert info["unexpected_keys"]


# What is written


def test_the_config_changes_by_the_sizes_and_the_class_only(source: SourceModel) -> None:
    raw = {**source.source.config, "auto_map": {"AutoConfig": "configuration_foreign.ForeignConfig"}}
    before = copy.deepcopy(raw)
    config = factored_config(raw, source, SIZES)
    assert raw == before
    assert config.pop("architectures") == ["FactoredMixtralForCausalLM"]
    # Anyone who agrees to run the modelling file must not run anything else with it.
    assert config.pop("auto_map") == {"AutoModelForCausalLM": "modeling_hcsmoe_factored.FactoredMixtralForCausalLM"}
    assert config.pop("hcsmoe") == {"layout": "factored", "rank": 3, "incoming_rows": 4, "outgoing_rows": 5}
    assert config == {key: raw[key] for key in raw if key not in ("architectures", "auto_map")}


def test_the_modelling_file_stands_alone(source: SourceModel) -> None:
    modules = set()
    for node in ast.walk(ast.parse(CODE.source(source))):
        match node:
            case ast.Import(names):
                modules |= {alias.name.partition(".")[0] for alias in names}
            case ast.ImportFrom(module, _, level):
                assert level == 0
                modules.add(str(module).partition(".")[0])
    assert modules - set(sys.stdlib_module_names) == {"torch", "transformers"}


def test_a_factored_result_describes_itself_as_its_source_would(folder: Path, source: SourceModel) -> None:
    model = read_model(LocalSource(folder))
    assert CODE.source(model) == CODE.source(source) == (folder / CODE.file).read_text()
    assert (model.factors, source.factors) == (SIZES, None)
    assert model.expert_map is None
    assert model.settings == source.settings
    assert [block.layer for block in model.blocks] == [block.layer for block in source.blocks]


# What is refused


@pytest.mark.parametrize(
    "section",
    [
        [],
        {"layout": "factored"},
        {"layout": "factored", "rank": 0, "incoming_rows": 4, "outgoing_rows": 5},
        {"layout": "factored", "rank": 3, "incoming_rows": -1, "outgoing_rows": 5},
        {"layout": "factored", "rank": True, "incoming_rows": 4, "outgoing_rows": 5},
        {"layout": "factored", "rank": 3, "incoming_rows": 4000, "outgoing_rows": 5},
        {"layout": "factored", "rank": 300, "incoming_rows": 4, "outgoing_rows": 5},
        {"layout": "factored", "rank": 3, "incoming_rows": 3, "outgoing_rows": 5},
    ],
)
def test_a_config_whose_sizes_are_damaged_is_a_known_failure(folder: Path, section: Any) -> None:
    checkpoint = LocalSource(folder)
    checkpoint.config = {**json.loads((folder / "config.json").read_text()), "hcsmoe": section}
    with pytest.raises(SourceError) as caught:
        read_model(checkpoint)
    assert caught.value.hint


def test_a_model_whose_router_scales_inputs_is_refused(tmp_path: Path) -> None:
    save_tiny("llama4_text", tmp_path)
    reason = factored_refusal(read_model(LocalSource(tmp_path)))
    assert reason is not None
    assert "Llama4TextExperts" in reason
