"""Folders as conversions leave them, but for the weights: a card is drawn from the files next to them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from places import GOLDEN
from safetensors.torch import save_file

from hcsmoe_hub.hub.open import open_source

GOLDEN = GOLDEN / "cards"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
# What a conversion keeps of the front matter of a source that says nothing.
SILENT = dict.fromkeys(("license", "license_name", "license_link", "language", "pipeline_tag")) | {"gated": False}
HUB = {"repo_id": "acme/Mixtral-tiny", "revision": COMMIT, **SILENT, "license": "apache-2.0", "language": ["en", "fr"]}
CONFIG = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
}
EXPERT = "model.layers.0.block_sparse_moe.experts.0.w1.weight"

Document = dict[str, Any]
MakeFolder = Callable[..., Path]


def merged(document: Document, changes: Document) -> Document:
    """A document with some of its values changed, at any depth."""
    result = dict(document)
    for key, value in changes.items():
        is_nested = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if is_nested else value
    return result


@pytest.fixture(scope="session")
def report() -> Document:
    """The report of a conversion from 8 to 4 experts in 4 layers, of no source yet."""
    document: Document = json.loads((GOLDEN / "report.json").read_text("utf-8"))
    return document


@pytest.fixture(scope="session")
def measures() -> Document:
    """What was measured of it."""
    document: Document = json.loads((GOLDEN / "measures.json").read_text("utf-8"))
    return document


@pytest.fixture
def make_folder(tmp_path: Path, report: Document) -> MakeFolder:
    """Makes the folder of a result: report and config with changes, names of tensors, and other files."""

    def make(
        changes: Document | None = None,
        *,
        source: Document = HUB,
        config: Document | None = None,
        tensors: tuple[str, ...] = (EXPERT,),
        files: tuple[str, ...] = ("tokenizer.json",),
        base: Document = report,
        name: str = "mixtral-tiny-hcsmoe-4e",
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        described = merged(merged(base, {"source": source}), changes or {})
        weight_map = dict.fromkeys(tensors, "model-00001-of-00001.safetensors")
        for file, content in (
            ("hcsmoe.json", described),
            ("config.json", merged(CONFIG, config or {})),
            ("model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map}),
        ):
            (folder / file).write_text(json.dumps(content), "utf-8")
        for file in files:
            (folder / file).write_text("{}", "utf-8")
        return folder

    return make


@pytest.fixture
def evaluated(make_folder: MakeFolder, measures: Document) -> MakeFolder:
    """Makes the folder of a result that was evaluated; of other weights if ``fingerprint`` is given."""

    def make(found: Document = measures, *, fingerprint: str | None = None, **arguments: Any) -> Path:
        folder = make_folder(**arguments)
        save_file({EXPERT: torch.ones(2, 2)}, folder / "model-00001-of-00001.safetensors")
        source = open_source(str(folder))
        model = {"fingerprint": fingerprint or source.fingerprint(source.tensors.values())}
        document = {"schema_version": 1, "tool": {"name": "hcsmoe", "version": "0"}, "model": model, "measures": found}
        (folder / "hcsmoe-evaluation.json").write_text(json.dumps(document), "utf-8")
        return folder

    return make
