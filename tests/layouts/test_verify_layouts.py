"""Verification of mapped and full results: what they promise is checked, and foreign code is never run."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import save_tiny
from mapped_models import Maps, example_maps, write_result
from places import GOLDEN
from tiny_models import change_config, change_tensors, read_tensors
from transformers import AutoModelForCausalLM, GenerationConfig

import hcsmoe_hub.result.verify
from hcsmoe_hub.checkpoint.source import LocalSource
from hcsmoe_hub.errors import HcsmoeError, SourceError, VerificationError
from hcsmoe_hub.model.source_model import read_model
from hcsmoe_hub.planning.mapped_layout import CODE
from hcsmoe_hub.result.reload import PROMPT_LENGTH
from hcsmoe_hub.result.verify import GENERATED_TOKENS, check_structure, verify

MAPS = {0: [0, 1, 0, 2, 1, 0], 1: [0, 0, 0, 0, 1, 1]}
ROUTER = "model.layers.1.block_sparse_moe.gate.weight"
EXPERT = "model.layers.1.block_sparse_moe.experts.1.w2.weight"


def write_report(folder: Path, layout: str, maps: Maps, **changes: Any) -> None:
    """Writes the report of another conversion with the layout, the experts and the clusters of this one."""
    report: dict[str, Any] = json.loads((GOLDEN / "cards" / "report.json").read_text("utf-8"))
    layers = []
    for layer, labels in maps.items():
        dominant = [list(labels).index(cluster) for cluster in range(max(labels) + 1)]
        found = {"layer": layer, "labels": labels, "dominant": dominant, "experts": len(dominant), "usage": [1] * 6}
        layers.append(report["layers"][0] | found | {"tree": None})
    report["method"]["layout"] = layout
    report["experts"] |= {"before": 6, "after": max(layer["experts"] for layer in layers)} | changes.pop("experts", {})
    (folder / "hcsmoe.json").write_text(json.dumps(report | {"layers": layers} | changes))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Mixtral of six experts, and a tensor that it does not load."""
    folder = tmp_path_factory.mktemp("layouts") / "source"
    save_tiny("mixtral", folder)
    return folder


@pytest.fixture
def mapped(source: Path, tmp_path: Path) -> Path:
    """Its mapped result."""
    folder = write_result(source, tmp_path / "mapped", MAPS, mapped=True)
    write_report(folder, "mapped", MAPS)
    return folder


@pytest.fixture
def full(source: Path, tmp_path: Path) -> Path:
    """Its full result."""
    folder = write_result(source, tmp_path / "full", MAPS, mapped=False)
    write_report(folder, "full", MAPS)
    return folder


@pytest.fixture
def without_reload(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the fresh process, which takes seconds, where something else is tested."""
    monkeypatch.setattr(hcsmoe_hub.result.verify, "_reload", lambda model: [])


def fails(folder: Path, *says: str, kind: type[HcsmoeError] = VerificationError, source: Path | None = None) -> None:
    """Checks that a folder is refused with an error that says certain things and what to do."""
    with pytest.raises(kind) as caught:
        _ = check_structure(folder) if source is None else verify(folder, against=LocalSource(source))
    assert [text for text in says if text not in caught.value.message] == []
    assert caught.value.hint


@pytest.mark.parametrize("model_type", ["mixtral", "dbrx", "zaya"])
def test_what_transformers_saves_of_a_mapped_result_passes_in_a_fresh_process(model_type: str, tmp_path: Path) -> None:
    save_tiny(model_type, tmp_path / "source")
    original = read_model(LocalSource(tmp_path / "source"))
    maps = example_maps(original)
    folder = write_result(tmp_path / "source", tmp_path / "mapped", maps, mapped=True)
    assert check_structure(folder).expert_map == {layer: tuple(row_map) for layer, row_map in maps.items()}
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model.save_pretrained(tmp_path / "again")

    found = verify(tmp_path / "again", against=LocalSource(tmp_path / "source"))
    assert (found.experts, found.moe_layers) == (max(max(row_map) + 1 for row_map in maps.values()), len(maps))
    experts = {tensor.name for block in original.blocks for tensor in block.experts}
    untouched = [key for group in original.groups.values() for key, to in group.targets.items() if to not in experts]
    assert found.identical == len(untouched)
    prompt = torch.arange(PROMPT_LENGTH)[None]
    model.generation_config = GenerationConfig(max_new_tokens=GENERATED_TOKENS, do_sample=False, pad_token_id=0)
    # Otherwise the first token of the prompt would count as padding.
    tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt))
    assert found.generated == tokens[0, PROMPT_LENGTH:].tolist()


@pytest.mark.usefixtures("without_reload")
def test_routers_of_mapped_and_full_results_are_compared_and_experts_are_not(
    source: Path, mapped: Path, full: Path
) -> None:
    for folder, experts in ((mapped, 3), (full, 6)):
        change_tensors(folder, lambda tensors: tensors[EXPERT].mul_(2))
        found = verify(folder, against=LocalSource(source))
        assert found.identical == len([name for name in read_tensors(source) if ".experts." not in name])
        assert found.experts == experts
        change_tensors(folder, lambda tensors: tensors[ROUTER].view(torch.uint8)[0, 0].bitwise_xor_(1))
        fails(folder, f"tensor {ROUTER!r} differs from {source}", source=source)


@pytest.mark.usefixtures("without_reload")
@pytest.mark.parametrize("kept", [True, False])
def test_prediction_heads_are_kept_as_a_whole_or_left_out(source: Path, tmp_path: Path, kept: bool) -> None:
    heads = {f"mtp.layers.0.{name}.weight": torch.ones(2, 2) for name in ("proj", "norm")}
    start = shutil.copytree(source, tmp_path / "source")
    change_tensors(start, lambda tensors: tensors.update(heads))
    folder = write_result(start, tmp_path / "mapped", MAPS, mapped=True)
    if kept:
        count = verify(folder, against=LocalSource(start)).identical
        assert count == len([name for name in read_tensors(start) if ".experts." not in name])
        change_tensors(folder, lambda tensors: tensors.pop("mtp.layers.0.norm.weight"))
        fails(folder, "'mtp.layers.0.norm.weight'", "is missing", source=start)
    else:
        change_tensors(folder, lambda tensors: [tensors.pop(name) for name in heads])
        count = verify(folder, against=LocalSource(start)).identical
        assert count == len([name for name in read_tensors(source) if ".experts." not in name])


@pytest.mark.parametrize("damage", ["changed", "line_ends", "missing"])
def test_a_modelling_file_that_is_not_ours_is_not_run(mapped: Path, damage: str, tmp_path: Path) -> None:
    file, mark = mapped / CODE.file, tmp_path / "it_ran"
    text = file.read_bytes()
    match damage:
        case "changed":
            file.write_bytes(text + f"\nopen({str(mark)!r}, 'w').close()\n".encode())
        case "line_ends":
            file.write_bytes(text.replace(b"\n", b"\r\n"))
        case _:
            file.unlink()
    with pytest.raises(VerificationError, match="foreign code is never run"):
        verify(mapped)
    assert not mark.exists()


@pytest.mark.parametrize(
    "auto_map",
    [
        None,
        {},
        {"AutoModelForCausalLM": "modeling_other.MappedMixtralForCausalLM"},
        {"AutoModelForCausalLM": "someone/else--modeling_hcsmoe.MappedMixtralForCausalLM"},
        {
            "AutoConfig": "configuration_foreign.ForeignConfig",
            "AutoModelForCausalLM": "modeling_hcsmoe.MappedMixtralForCausalLM",
        },
    ],
)
def test_an_entry_that_leads_to_other_code_is_not_followed(mapped: Path, auto_map: dict[str, str] | None) -> None:
    change_config(mapped, auto_map=auto_map)
    fails(mapped, "auto_map", "foreign code is never run")


def test_code_for_generation_that_would_run_along_is_refused(mapped: Path) -> None:
    (mapped / "custom_generate").mkdir()
    (mapped / "custom_generate" / "generate.py").touch()
    fails(mapped, "custom_generate", "foreign code is never run")


def test_a_plain_checkpoint_that_names_code_of_its_own_passes_without_it(source: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(source, tmp_path / "result")
    change_config(folder, auto_map={"AutoModelForCausalLM": "modeling_foreign.Foreign"})
    (folder / "modeling_foreign.py").write_text("raise SystemExit('foreign code ran')")
    assert len(verify(folder).generated) == GENERATED_TOKENS


@pytest.mark.parametrize("layout", ["mapped", "full"])
def test_a_count_that_the_result_contradicts_fails(mapped: Path, full: Path, layout: str) -> None:
    folder = mapped if layout == "mapped" else full
    write_report(folder, layout, MAPS, experts={"before": 6, "after": 4})
    fails(folder, "hcsmoe.json declares 4 experts per layer, but its layers have 2 to 3")


def test_a_report_of_another_layout_fails(mapped: Path, full: Path) -> None:
    for layout in ("reduced", "full"):
        write_report(mapped, layout, MAPS)
        fails(mapped, f"hcsmoe.json names the layout {layout}", "a map from router rows")
    write_report(full, "mapped", MAPS)
    fails(full, "hcsmoe.json names the layout mapped", "no map")
    write_report(full, "circular", MAPS)
    fails(full, "hcsmoe.json names the layout 'circular'")


@pytest.mark.parametrize("layers", [None, {}, [{}], [{"labels": 3}], [{"labels": [[0]]}], [3]])
def test_a_report_without_clusters_is_a_known_failure(full: Path, layers: Any) -> None:
    write_report(full, "full", MAPS, layers=layers)
    fails(full, "hcsmoe.json")


def test_experts_that_the_map_does_not_know_fail(mapped: Path) -> None:
    config = json.loads((mapped / "config.json").read_text())
    config["hcsmoe"]["expert_map"]["1"] = [0, 0, 0, 0, 0, 0]
    (mapped / "config.json").write_text(json.dumps(config))
    fails(mapped, "config.json describes", kind=SourceError)
