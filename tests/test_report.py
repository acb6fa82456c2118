"""What a conversion says about itself: the returned report, ``hcsmoe.json``, and every layer in it."""

import hashlib
import json
import shutil
from dataclasses import fields, replace
from pathlib import Path

import pytest
from calibration_text import VOCABULARY, text, write_rows, write_tokenizer
from huggingface_hub import ModelCard
from tiny_models import LENGTH, SEQUENCES, build, contents, options, read_tensors
from torch import Tensor

from hcsmoe_hub import CalibrationOptions, ConvertOptions, MethodOptions, convert
from hcsmoe_hub.checkpoint.source import LocalSource
from hcsmoe_hub.evaluation.evaluate import evaluate
from hcsmoe_hub.evaluation.options import EvaluateOptions
from hcsmoe_hub.events import Warned
from hcsmoe_hub.model_cards import write_card
from hcsmoe_hub.options import Layout, Preset
from hcsmoe_hub.publishing.files import checkpoint_files
from hcsmoe_hub.recipe.recipe import Recipe
from hcsmoe_hub.report import LayerReport, RouterReport, strip_paths

# What is kept of a source without a card.
SILENT = dict.fromkeys(("license", "license_name", "license_link", "language", "pipeline_tag")) | {"gated": False}
LICENSED = "---\nlicense: other\nlicense_name: acme\nlicense_link: {link}\nlanguage: [en]\n---\n# Base\n"
# In the name of a folder that nobody has to know of, and a token that nobody may.
SECRET, TOKEN = "secret-user", "hf_very_secret_token"
MODEL_TYPES = ["mixtral", "qwen3_moe", "deepseek_v3"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tiny Mixtral: 2 layers, 8 experts, 2 per token."""
    return build(tmp_path / "model")


@pytest.fixture
def result(tmp_path: Path) -> Path:
    """Where conversions write."""
    return tmp_path / "result"


def test_the_report_is_the_returned_one(source: Path, result: Path) -> None:
    report = convert(source, options(source, 4)).as_dict()
    written = json.loads((result / "hcsmoe.json").read_text())
    # The file is part of what the last stage checks, so it is written before that stage has been timed.
    assert report["timings_seconds"].pop("verify") >= 0
    assert written == report


def test_the_report_has_every_key_of_the_contract(source: Path, result: Path) -> None:
    convert(source, options(source, 4, experts_per_token=1))
    report = json.loads((result / "hcsmoe.json").read_text())
    assert next(iter(report)) == "schema_version"
    assert report["schema_version"] == 2
    assert report["tool"]["name"] == "hcsmoe"
    described = dict(report["source"])
    assert len(described.pop("fingerprint")) == 64
    assert described == {"path": "model", "revision": None, "model_type": "mixtral", **SILENT}
    assert report["experts"] == {
        "before": 8,
        "after": 4,
        "per_token_before": 2,
        "per_token_after": 1,
        "moe_layers": 2,
    }
    sizes = {"before": read_tensors(source), "after": read_tensors(result)}
    assert report["parameters"] == {when: sum(t.numel() for t in sizes[when].values()) for when in sizes}
    assert report["active_parameters"] == {
        "before": active(sizes["before"], 2, of=8),
        "after": active(sizes["after"], 1, of=4),
    }
    assert report["weights_bytes"] == {when: sum(t.nbytes for t in sizes[when].values()) for when in sizes}
    # What experts are compressed to, and aligned with, is there only where they are.
    assert report["method"].keys() == {field.name for field in fields(Recipe)} - {"compress", "align_to"}
    chosen = {name: value for name, value in report["method"].items() if value is not None}
    assert chosen == {
        "method": "merge",
        "similarity": "expert-output",
        "distance": "euclidean",
        "clustering": "hierarchical",
        "linkage": "average",
        "dominant": "frequency",
        "budget": "uniform",
        "merge": "frequency",
        "align": "none",
        "refit": "none",
        "router": "dominant",
        "layout": "reduced",
        "seed": 42,
    }
    calibration = dict(report["calibration"])
    assert len(calibration.pop("sha256")) == 64
    assert calibration == {
        "dataset": "ids.npy",
        "sequences": SEQUENCES,
        "sequence_length": LENGTH,
        "tokens": SEQUENCES * LENGTH,
        "seed": 42,
        "text_column": None,
        "feature_tokens": 2048,
        "dataset_sha256": hashlib.sha256((source.parent / "ids.npy").read_bytes()).hexdigest(),
        "domains": [
            {"domain": "ids.npy", "sequences": SEQUENCES, "tokens": SEQUENCES * LENGTH, "measured_tokens": 0},
        ],
    }
    assert [entry["layer"] for entry in report["layers"]] == [0, 1]
    # Ranks belong to factors.
    expected = {field.name for field in fields(LayerReport)} - {"stable_rank"}
    assert all(entry.keys() == expected for entry in report["layers"])
    assert all(entry["router"].keys() == {field.name for field in fields(RouterReport)} for entry in report["layers"])
    # Nothing was asked to be fitted.
    unfitted = {"is_fitted": None, "top_k_agreement_before": None}
    assert all(entry["router"].items() >= unfitted.items() for entry in report["layers"])
    assert report.keys() >= {"timings_seconds", "peak_memory_bytes"}
    assert report["versions"].keys() >= {"python", "torch", "transformers", "safetensors"}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_layers_are_described_consistently(tmp_path: Path, model_type: str) -> None:
    source = build(tmp_path / "model", model_type)
    report = convert(source, options(source, 4))
    first = 1 if model_type == "deepseek_v3" else 0
    assert [layer.layer for layer in report.layers] == list(range(first, first + 2))
    for layer in report.layers:
        assert list(dict.fromkeys(layer.labels)) == [0, 1, 2, 3]
        assert [layer.labels[expert] for expert in layer.dominant] == [0, 1, 2, 3]
        assert sum(layer.usage) == SEQUENCES * LENGTH * 2
        assert [len(values) for values in (layer.usage, layer.saliency, layer.merge_heights)] == [8, 8, 4]
        assert layer.merge_heights == sorted(layer.merge_heights)
        assert layer.tree is not None
        assert [height for _, _, height in layer.tree][:4] == layer.merge_heights
        assert sum(layer.routing_score) == pytest.approx(1)
        assert layer.dead_experts == [expert for expert, count in enumerate(layer.usage) if count == 0]
        assert (layer.experts, layer.measured_tokens) == (4, SEQUENCES * LENGTH)
        assert 0 < layer.router.top_k_agreement < 1
        assert layer.output_error > 0


def test_the_dominant_expert_is_the_most_used_one(source: Path) -> None:
    for layer in convert(source, options(source, 4)).layers:
        for cluster, dominant in enumerate(layer.dominant):
            assert layer.usage[dominant] == max(
                usage for usage, label in zip(layer.usage, layer.labels, strict=True) if label == cluster
            )


def active(tensors: dict[str, Tensor], per_token: int, *, of: int) -> int:
    """Parameters that a token passes: of every expert tensor, the share that is visited."""
    return sum(t.numel() * per_token // of if ".experts." in name else t.numel() for name, t in tensors.items())


@pytest.mark.parametrize("layout", [layout for layout in Layout if layout is not Layout.FACTORED])
def test_a_token_passes_as_many_experts_in_every_layout(source: Path, result: Path, layout: Layout) -> None:
    report = convert(source, options(source, 4, method=MethodOptions(preset=Preset.HC_SMOE, layout=layout)))
    before = active(read_tensors(source), 2, of=8)
    rows = 4 * 32 * 2 if layout is Layout.REDUCED else 0
    assert report.active_parameters == {"before": before, "after": before - rows}


# What the card of the source says


@pytest.mark.parametrize("link", ["LICENSE.md", "./LICENSE.md", "https://acme.org/licence"])
def test_a_licence_of_its_own_travels_with_the_file_that_it_links_to(source: Path, result: Path, link: str) -> None:
    (source / "README.md").write_text(LICENSED.format(link=link), "utf-8")
    (source / "LICENSE.md").write_text("Be kind.", "utf-8")
    report = convert(source, options(source, 4))
    said = {"license": "other", "license_name": "acme", "license_link": link, "language": ["en"]}
    assert report.source.items() >= said.items()
    card = ModelCard(write_card(result, "me/pushed").path.read_text("utf-8"))
    assert (card.data.license, card.data.license_name) == ("other", "acme")
    target = card.data.license_link
    # A relative link leads to a file next to the card, in whichever repository it is.
    assert target == link if "://" in link else (result / target).read_text("utf-8") == "Be kind."
    assert result / "LICENSE.md" in checkpoint_files(LocalSource(result))


def test_a_card_that_cannot_be_read_costs_no_result(source: Path, result: Path) -> None:
    (source / "README.md").write_text("---\nlicense: [mit\n---\n", "utf-8")
    messages = []
    report = convert(source, options(source, 4), listener=messages.append)
    (warning,) = report.warnings
    assert warning.startswith("README.md of model cannot be read: its front matter is not valid YAML")
    assert warning in [event.message for event in messages if isinstance(event, Warned)]
    assert "license" not in report.source
    assert "Not recorded." in write_card(result).path.read_text("utf-8")


# What nobody has to know


@pytest.fixture
def private(tmp_path: Path) -> Path:
    """A folder with a telling name, and in it a model, calibration text, and text and questions to measure it on."""
    folder = tmp_path / SECRET / "models"
    build(folder / "base", vocab_size=VOCABULARY, max_position_embeddings=256, bos_token_id=None, eos_token_id=0)
    write_tokenizer(folder / "base", eos_token="</s>")
    for name in ("calib", "heldout"):
        write_rows(folder / f"{name}.jsonl", [{"text": text(7 * number, 40)} for number in range(3)])
    questions = [{"context": text(0, 3), "choices": [text(5, 2), text(9, 3)], "gold": 0}]
    write_rows(folder / "questions.jsonl", questions)
    return folder


@pytest.mark.parametrize("is_reused", [False, True], ids=["direct", "from statistics"])
def test_no_file_of_a_result_names_a_place_or_a_token(
    private: Path, monkeypatch: pytest.MonkeyPatch, is_reused: bool
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    result, statistics = private / "result", private / "statistics"
    wanted = ConvertOptions(
        experts=4,
        output=result,
        calibration=CalibrationOptions(dataset=str(private / "calib.jsonl"), sequence_length=16),
        statistics=statistics,
        figure=True,
    )
    report = convert(private / "base", wanted, token=TOKEN)
    if is_reused:
        shutil.rmtree(result)
        convert(private / "base", wanted, token=TOKEN)
    # A warning that named a path when it was given.
    assert is_reused or any("calib.jsonl fills" in message for message in report.warnings)
    asked = EvaluateOptions(
        perplexity=private / "heldout.jsonl", choices=private / "questions.jsonl", window=16, device="cpu"
    )
    evaluate(result, replace(asked, base=private / "base"), token=TOKEN)
    write_card(result, overwrite=True)
    found = contents(result) | {"statistics": statistics.read_bytes()}
    assert found.keys() >= {"hcsmoe.json", "hcsmoe-evaluation.json", "hcsmoe.png", "README.md", "config.json"}
    assert [(name, word) for name, held in found.items() for word in (SECRET, TOKEN) if word.encode() in held] == []


@pytest.mark.parametrize(
    ("message", "kept"),
    [
        ("/data/my texts/calib.jsonl fills 2 of 3.", "calib.jsonl fills 2 of 3."),
        (
            "see https://huggingface.co/docs/hub, and/or ~/private/notes.txt",
            "see https://huggingface.co/docs/hub, and/or notes.txt",
        ),
        ("org/dataset fills 2 of 3.", "org/dataset fills 2 of 3."),
        ("[Errno 13] Permission denied: '/home/x/README.md'.", "[Errno 13] Permission denied: 'README.md'."),
    ],
)
def test_messages_lose_their_places_and_nothing_else(message: str, kept: str) -> None:
    assert strip_paths(message, {"/data/my texts/calib.jsonl": "calib.jsonl"}) == kept
