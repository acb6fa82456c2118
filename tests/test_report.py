"""What a conversion says about itself: the returned report, ``hcsmoe.json``, and every layer in it."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
from tiny_models import LENGTH, SEQUENCES, build, options, read_tensors

from hcsmoe_hub import MethodOptions, convert
from hcsmoe_hub.report import LayerReport, RouterReport

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
    assert report["schema_version"] == 1
    assert report["tool"]["name"] == "hcsmoe"
    assert report["source"] == {"path": str(source), "revision": None, "model_type": "mixtral"}
    assert report["experts"] == {
        "before": 8,
        "after": 4,
        "per_token_before": 2,
        "per_token_after": 1,
        "moe_layers": 2,
    }
    sizes = {"before": read_tensors(source), "after": read_tensors(result)}
    assert report["parameters"] == {when: sum(t.numel() for t in sizes[when].values()) for when in sizes}
    assert report["weights_bytes"] == {when: sum(t.nbytes for t in sizes[when].values()) for when in sizes}
    assert report["method"].keys() == {field.name for field in fields(MethodOptions)}
    chosen = {name: value for name, value in report["method"].items() if value is not None}
    assert chosen == {
        "method": "merge",
        "similarity": "expert-output",
        "distance": "euclidean",
        "clustering": "hierarchical",
        "linkage": "average",
        "dominant": "usage",
        "budget": "uniform",
        "merge": "frequency",
        "align": "none",
        "correct": "none",
        "router": "dominant",
        "layout": "reduced",
        "seed": 42,
    }
    calibration = dict(report["calibration"])
    assert len(calibration.pop("sha256")) == 64
    assert calibration == {
        "dataset": str(source.parent / "ids.npy"),
        "sequences": SEQUENCES,
        "sequence_length": LENGTH,
        "tokens": SEQUENCES * LENGTH,
        "seed": 42,
    }
    assert [entry["layer"] for entry in report["layers"]] == [0, 1]
    assert all(entry.keys() == {field.name for field in fields(LayerReport)} for entry in report["layers"])
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
