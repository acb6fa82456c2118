"""Every architecture, end to end: a tiny model is saved, converted from six experts to three, and loaded strictly.

The same with experts of half the width, alone and along with fewer of them.
"""

import dataclasses
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import EXPERTS, REFUSED, SUPPORTED, VOCABULARY, inputs_of, save_tiny
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hcsmoe_hub import CalibrationOptions, ConvertOptions, MethodOptions, Preset, convert
from hcsmoe_hub.checkpoint.config_json import CAPACITY_KEYS, EXPERT_KEYS
from hcsmoe_hub.errors import PlanError, UnsupportedModelError
from hcsmoe_hub.model.architectures import ARCHITECTURES, WIDTH_DIVISORS
from hcsmoe_hub.model.expert_kinds import is_experts_module
from hcsmoe_hub.model.width import SHARED_KEYS
from hcsmoe_hub.model.wrong_experts import run_chosen_experts
from hcsmoe_hub.report import ConversionReport

KEPT = 3


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token ids ``[6, 12]``; the number of sequences and their length differ, as those of real sets do."""
    path = tmp_path_factory.mktemp("calibration") / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(3, VOCABULARY, (6, 12)))
    return path


def run(
    source: Path, output: Path, calibration: Path, experts: int | None, width: str | None = None
) -> ConversionReport:
    options = ConvertOptions(
        experts=experts,
        expert_width=width,
        method=MethodOptions(preset=Preset.HC_SMOE),
        output=output,
        device="cpu",
        batch_tokens=24,
        calibration=CalibrationOptions(dataset=str(calibration)),
    )
    return convert(source, options)


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for shard in folder.glob("*.safetensors") for name, tensor in load_file(shard).items()}


def count_choices(model: PreTrainedModel, ids: Tensor) -> list[list[int]]:
    """How often the plain model's own routers choose each expert, layer by layer."""
    counts: list[Tensor] = []

    def on_experts(_module: nn.Module, inputs: Any) -> None:
        _, index, weight = inputs
        counts.append(torch.bincount(index[weight != 0], minlength=EXPERTS))

    def on_llama4_router(module: Any, _inputs: Any, output: Any) -> None:
        chosen = output[1].topk(module.top_k).indices
        counts.append(torch.bincount(chosen.reshape(-1), minlength=EXPERTS))

    def on_mask(_module: nn.Module, _inputs: Any, output: Any) -> None:
        # Switch Transformers: one-hot without dropped tokens. NLLB-MoE: weights.
        mask = output[0] if output[0].dim() == 3 else output[1]
        counts.append((mask != 0).flatten(0, -2).sum(0))

    for module in model.modules():
        if type(module).__name__ in ("SwitchTransformersTop1Router", "NllbMoeTop2Router"):
            module.register_forward_hook(on_mask)
        elif type(module).__name__ == "Llama4Router":
            module.register_forward_hook(on_llama4_router)
        elif is_experts_module(module) and type(module).__name__ != "Llama4TextExperts":
            module.register_forward_pre_hook(on_experts)
    run_chosen_experts(model)
    with torch.no_grad():
        model.base_model(**inputs_of(model, ids))
    return [count.tolist() for count in counts]


def changed_keys(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    nested = {key for key, value in before.items() if isinstance(value, dict)}
    inner = set().union(*(changed_keys(before[key], after[key]) for key in nested)) if nested else set()
    return inner | {
        key for key in before.keys() | after.keys() if key not in nested and before.get(key) != after.get(key)
    }


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_architecture_converts_and_loads_strictly(
    model_type: str, tmp_path: Path, calibration: Path, record_property: Callable[[str, object], None]
) -> None:
    source, reduced, identical = (tmp_path / name for name in ("source", "reduced", "identical"))
    model = save_tiny(model_type, source)
    start = time.perf_counter()
    report = run(source, reduced, calibration, KEPT)
    seconds = time.perf_counter() - start

    loaded, info = type(model).from_pretrained(reduced, output_loading_info=True)
    assert not any(info.values()), info
    ids = torch.from_numpy(np.load(calibration))
    with torch.no_grad():
        assert loaded.eval()(**inputs_of(loaded, ids)).logits.isfinite().all()
    generated = loaded.generate(ids[:1], max_new_tokens=3, min_new_tokens=3, do_sample=False)
    # A decoder that does not continue its input begins with a token of its own.
    assert generated.shape == ((1, 4) if loaded.config.is_encoder_decoder else (1, 15))

    originals, results = stored(source), stored(reduced)
    assert results.keys() < originals.keys() or results.keys() == originals.keys()
    assert all(results[name].dtype == originals[name].dtype for name in results)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, reduced))
    assert changed_keys(before, after) <= {*EXPERT_KEYS, *CAPACITY_KEYS}
    assert [layer.usage for layer in report.layers] == count_choices(model, ids)

    same = run(source, identical, calibration, EXPERTS, "100%")
    copies = stored(identical)
    assert copies.keys() == originals.keys()
    assert all(torch.equal(copies[name], originals[name]) for name in originals)
    assert (identical / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert all(layer.output_error == 0 and layer.router.top_k_agreement == 1 for layer in same.layers)
    record_property("line", f"{model_type}: {len(report.layers)} layers, {EXPERTS} to {KEPT} experts, {seconds:.1f} s")


def is_routed(name: str) -> bool:
    """Whether a stored tensor belongs to the router or to routed experts."""
    return re.search(r"expert|block_sparse_moe|router|gate\.|wg\.|e_score|ffn\.|moe|tid2eid", name) is not None


def check_narrowed(source: Path, result: Path, kind: type[PreTrainedModel], ids: Tensor) -> None:
    """Checks that a result loads plainly, and that everything but routed experts and routers is the source's."""
    loaded, info = kind.from_pretrained(result, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        assert loaded.eval()(**inputs_of(loaded, ids)).logits.isfinite().all()
    before, after = stored(source), stored(result)
    assert after.keys() <= before.keys()
    kept = [name for name in before if "shared" in name or not is_routed(name)]
    assert [name for name in kept if not torch.equal(before[name], after[name])] == []
    assert all(after[name].dtype == before[name].dtype for name in after)


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_architecture_takes_experts_of_half_the_width_or_says_why_not(
    model_type: str, tmp_path: Path, calibration: Path
) -> None:
    source, narrow, both = (tmp_path / name for name in ("source", "narrow", "both"))
    model, ids = save_tiny(model_type, source), torch.from_numpy(np.load(calibration))
    family = ARCHITECTURES[model_type]
    if not family.width:
        with pytest.raises(PlanError, match=r"cannot be made narrower: \w+ of its config also sets the") as caught:
            run(source, narrow, calibration, None, "50%")
        assert caught.value.hint == "leave `expert_width` out and keep fewer `experts`"
        assert not narrow.exists()
        return

    alone = run(source, narrow, calibration, None, "50%")
    fewer = run(source, both, calibration, KEPT, "50%")
    for report, folder, experts in ((alone, narrow, EXPERTS), (fewer, both, KEPT)):
        counts = report.experts
        assert (counts["after"], 2 * counts["width_after"]) == (experts, counts["width_before"])
        check_narrowed(source, folder, type(model), ids)
        config = json.loads((folder / "config.json").read_text())
        changed = changed_keys(json.loads((source / "config.json").read_text()), config)
        shared = changed & set(SHARED_KEYS)
        assert bool(shared) is (family.width == WIDTH_DIVISORS)
        assert len(changed - shared - set(EXPERT_KEYS)) == 1
    assert sum(layer.output_error for layer in alone.layers) < sum(layer.output_error for layer in fewer.layers)
    assert all(layer.router.top_k_agreement == 1 for layer in alone.layers)


@pytest.mark.parametrize("model_type", REFUSED)
def test_refused_architecture_says_why_and_writes_nothing(
    model_type: str, tmp_path: Path, calibration: Path, record_property: Callable[[str, object], None]
) -> None:
    save_tiny(model_type, tmp_path / "source")
    with pytest.raises(UnsupportedModelError, match="refused") as caught:
        run(tmp_path / "source", tmp_path / "result", calibration, KEPT)
    assert ARCHITECTURES[model_type].refusal in caught.value.message
    assert not (tmp_path / "result").exists()
    record_property("line", f"{model_type}: refused, {ARCHITECTURES[model_type].refusal}")


def test_every_mixture_of_experts_of_transformers_is_listed() -> None:
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        config = CONFIG_MAPPING[model_type]
        text = config.sub_configs.get("text_config", config)
        # A composite that can wrap any text model (AutoConfig) is looked up by that model's own type.
        if dataclasses.is_dataclass(text):
            names = {field.name for field in dataclasses.fields(text)} | set(text.attribute_map)
            assert not names & set(EXPERT_KEYS) or text.model_type in ARCHITECTURES, model_type
