"""Results of encoder-decoder models in every layout: what converting, loading and verifying them gives."""

import io
import json
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from encoder_decoders import BUILDERS, EXPERTS, MOE_LAYERS, SOURCE, TARGET, VOCABULARY, logits, pairs, stored_experts
from tiny_models import differing, read_config, read_tensors
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM

from hcsmoe_hub import CalibrationOptions, ConvertOptions, MethodOptions, Preset, convert, plan, verify
from hcsmoe_hub.checkpoint.auto_class import WRONG_EXPERTS
from hcsmoe_hub.checkpoint.source import LocalSource
from hcsmoe_hub.cli.documents import model_document
from hcsmoe_hub.errors import VerificationError
from hcsmoe_hub.evaluation.checkpoint import Checkpoint
from hcsmoe_hub.evaluation.scorer import Request
from hcsmoe_hub.evaluation.scorers import StreamedScorer
from hcsmoe_hub.model import wrong_experts
from hcsmoe_hub.model.source_model import read_model
from hcsmoe_hub.options import Layout
from hcsmoe_hub.report.read import read_report
from hcsmoe_hub.result import reload
from hcsmoe_hub.result.verify import GENERATED_TOKENS

KEPT = 4
WITH_CODE = (Layout.MAPPED, Layout.FACTORED)
every_kind = pytest.mark.parametrize("model_type", BUILDERS)
every_layout = pytest.mark.parametrize("layout", Layout)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model of each kind."""
    folder = tmp_path_factory.mktemp("encoder_decoders")
    for model_type, build in BUILDERS.items():
        build().save_pretrained(folder / model_type)
    np.save(folder / "ids.npy", np.random.default_rng(0).integers(3, VOCABULARY, (12, SOURCE + TARGET)))
    return {model_type: folder / model_type for model_type in BUILDERS}


def options(source: Path, output: Path, layout: Layout, *, experts: int = KEPT) -> ConvertOptions:
    compress = {"compress": "6,0.75"} if layout is Layout.FACTORED else {}
    return ConvertOptions(
        experts=experts,
        method=MethodOptions(preset=Preset.HC_SMOE, layout=layout, **compress),
        output=output,
        device="cpu",
        calibration=CalibrationOptions(dataset=str(source.parent / "ids.npy"), source_length=SOURCE),
    )


@pytest.fixture(scope="module")
def results(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, Layout], Path]:
    """The results of every kind in every layout."""
    folder = tmp_path_factory.mktemp("results")
    found = {}
    for model_type, source in sources.items():
        for layout in Layout:
            found[model_type, layout] = folder / f"{model_type}-{layout}"
            convert(source, options(source, found[model_type, layout], layout))
    return found


def load(folder: Path, layout: Layout) -> Any:
    """Loads a result as a user would, with the experts that its router chooses."""
    model, info = AutoModelForSeq2SeqLM.from_pretrained(
        folder, trust_remote_code=layout in WITH_CODE, output_loading_info=True
    )
    assert not any(info.values()), info
    if layout not in WITH_CODE:
        wrong_experts.run_chosen_experts(model)
    return model.eval()


def streamed_logits(folder: Path) -> Tensor:
    """Logits ``[3, TARGET, V]`` of the same pairs, layer by layer through both stacks."""
    checkpoint = Checkpoint(LocalSource(folder))
    source, target = pairs()
    requests = [
        Request(ids=tuple(row.tolist()), start=0, source=tuple(read.tolist()))
        for read, row in zip(source, target, strict=True)
    ]
    found = dict(StreamedScorer(checkpoint, torch.device("cpu")).logits(requests))
    return torch.stack([found[number] for number in range(len(requests))])


@every_layout
@every_kind
def test_a_loaded_result_computes_what_its_layers_do_one_by_one(
    results: dict[tuple[str, Layout], Path], model_type: str, layout: Layout
) -> None:
    folder = results[model_type, layout]
    torch.testing.assert_close(logits(load(folder, layout)), streamed_logits(folder), rtol=0, atol=2e-5)


@every_layout
@every_kind
def test_a_result_is_saved_and_loaded_again(
    results: dict[tuple[str, Layout], Path], model_type: str, layout: Layout, tmp_path: Path
) -> None:
    model = load(results[model_type, layout], layout)
    model.save_pretrained(tmp_path / "again")
    assert differing(read_tensors(tmp_path / "again"), read_tensors(results[model_type, layout])) == []
    torch.testing.assert_close(logits(load(tmp_path / "again", layout)), logits(model), rtol=0, atol=1e-6)


@pytest.fixture
def load_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verification without a fresh process, which would import its libraries anew for every result."""

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["reload", *command[command.index(reload.__name__) + 1 :]])
        with redirect_stdout(io.StringIO()) as stdout:
            reload.main()
        return SimpleNamespace(returncode=0, stdout=stdout.getvalue(), stderr="")

    monkeypatch.setattr(subprocess, "run", run)


@pytest.mark.usefixtures("load_here")
@every_layout
@every_kind
def test_a_result_verifies_against_its_source(
    results: dict[tuple[str, Layout], Path], sources: dict[str, Path], model_type: str, layout: Layout
) -> None:
    found = verify(results[model_type, layout], against=LocalSource(sources[model_type]))
    assert len(found.generated) == GENERATED_TOKENS
    assert found.moe_layers == len(MOE_LAYERS)
    assert found.experts == (EXPERTS if layout is Layout.FULL else KEPT)
    # Without a modelling file, plain transformers may run the wrong experts.
    assert bool(found.warnings) is (model_type == "nllb-moe" and layout not in WITH_CODE)


@every_kind
def test_the_map_names_layers_of_both_stacks_and_rows_keep_their_room(
    results: dict[tuple[str, Layout], Path], sources: dict[str, Path], model_type: str
) -> None:
    config, before = read_config(results[model_type, Layout.MAPPED]), read_config(sources[model_type])
    assert list(config["hcsmoe"]["expert_map"]) == [str(layer) for layer in MOE_LAYERS]
    name = f"modeling_hcsmoe.Mapped{before['architectures'][0]}"
    assert config["auto_map"] == {"AutoModelForSeq2SeqLM": name}
    unchanged = before.keys() - {"architectures"}
    assert {key: config[key] for key in unchanged} == {key: before[key] for key in unchanged}
    model = load(results[model_type, Layout.MAPPED], Layout.MAPPED)
    assert {layer: experts.num_experts for layer, experts in stored_experts(model).items()} == dict.fromkeys(
        MOE_LAYERS, KEPT
    )


@every_layout
@every_kind
def test_the_card_says_how_to_load_it(results: dict[tuple[str, Layout], Path], model_type: str, layout: Layout) -> None:
    card = " ".join((results[model_type, layout] / "README.md").read_text().split())
    assert "AutoModelForSeq2SeqLM" in card
    assert "CausalLM" not in card
    assert ("trust_remote_code=True" in card) is (layout in WITH_CODE)
    assert (f"**transformers {transformers.__version__} {WRONG_EXPERTS}" in card) is (
        model_type == "nllb-moe" and layout not in WITH_CODE
    )
    task = {"nllb-moe": "translation", "switch_transformers": "text2text-generation"}[model_type]
    assert f"pipeline_tag: {task}" in card


@every_kind
def test_inspect_counts_the_layers_of_each_stack(results: dict[tuple[str, Layout], Path], model_type: str) -> None:
    for layout in Layout:
        experts = model_document(read_model(LocalSource(results[model_type, layout])))["experts"]
        assert experts["encoder"] == {"layers": 4, "moe_layers": 2}
        assert experts["decoder"] == {"layers": 2, "moe_layers": 1}
        assert (experts["layers"], experts["moe_layers"]) == (6, 3)


# The fault of transformers 5.23


def test_a_plan_names_a_version_that_runs_the_wrong_experts(sources: dict[str, Path], tmp_path: Path) -> None:
    for model_type, source in sources.items():
        for layout in Layout:
            warnings = plan(source, options(source, tmp_path / "result", layout)).warnings
            expected = model_type == "nllb-moe" and layout not in WITH_CODE
            assert any(WRONG_EXPERTS in warning for warning in warnings) is expected


def test_the_report_names_it_too(results: dict[tuple[str, Layout], Path]) -> None:
    for (model_type, layout), folder in results.items():
        report = read_report((folder / "hcsmoe.json").read_text(), label="hcsmoe.json")
        expected = model_type == "nllb-moe" and layout not in WITH_CODE
        assert any(WRONG_EXPERTS in warning for warning in report.warnings) is expected


def test_nothing_is_said_or_repaired_once_it_is_mended(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wrong_experts.runs_wrong_experts()
    monkeypatch.setattr(wrong_experts, "runs_wrong_experts", lambda: False)
    assert wrong_experts.wrong_experts_warning("nllb-moe") is None
    model = BUILDERS["nllb-moe"]()
    before = logits(model)
    wrong_experts.run_chosen_experts(model)
    assert torch.equal(logits(model), before)


def test_only_nllb_is_repaired() -> None:
    model = BUILDERS["switch_transformers"]()
    wrong_experts.run_chosen_experts(model)
    assert "forward" not in vars(stored_experts(model)[1])
    assert wrong_experts.wrong_experts_warning("switch_transformers") is None


# What is refused


@pytest.mark.parametrize("layout", WITH_CODE)
@every_kind
def test_another_auto_class_is_foreign_code(
    results: dict[tuple[str, Layout], Path], model_type: str, layout: Layout, tmp_path: Path
) -> None:
    folder = tmp_path / "changed"
    folder.mkdir()
    for file in results[model_type, layout].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = read_config(folder)
    config["auto_map"] = {"AutoModelForCausalLM": next(iter(config["auto_map"].values()))}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(VerificationError, match="auto_map"):
        verify(folder)


def test_a_mapped_result_loads_without_this_package(results: dict[tuple[str, Layout], Path], tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['hcsmoe_hub'] = None\n"
        "from transformers import AutoModelForSeq2SeqLM\n"
        "model = AutoModelForSeq2SeqLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "print(type(model).__name__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, str(results["nllb-moe", Layout.MAPPED])],
        capture_output=True,
        text=True,
        check=True,
        env={"HF_MODULES_CACHE": str(tmp_path), "PATH": ""},
    )
    assert done.stdout.splitlines()[-1] == "MappedNllbMoeForConditionalGeneration"
