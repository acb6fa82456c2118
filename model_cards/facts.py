"""Everything that a card is drawn from, read from the folder of a result and checked."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from hcsmoe_hub.errors import SourceError
from hcsmoe_hub.model_cards.shape import conform
from hcsmoe_hub.options import Layout, Method
from hcsmoe_hub.report import EVALUATION_FILE, REPORT_FILE, SCHEMA_VERSION, upgrade
from hcsmoe_hub.result.source_card import Inherited

Document = Mapping[str, Any]

_CHANGE = {"before": int, "after": int}
_CHECKPOINT = {name: (str, None) for name in ("repo_id?", "path?", "revision?", "fingerprint?")}
REPORT_SHAPE = {
    "tool": {"name": str, "version": str},
    "source": {**_CHECKPOINT, "model_type": str},
    "experts": {**_CHANGE, "per_token_before": int, "per_token_after": int, "moe_layers": int},
    "parameters": _CHANGE,
    "active_parameters": _CHANGE,
    "weights_bytes": _CHANGE,
    "method": {"method": str, "layout": str, "seed": int},
    "calibration": {
        "dataset": str,
        "sequences": int,
        "sequence_length": int,
        "tokens": int,
        "seed": int,
        "text_column": (str, None),
        "feature_tokens": int,
        "sha256": str,
    },
    "layers": [
        {
            "layer": int,
            "labels": [int],
            "dead_experts": [int],
            "router": {
                "policy": str,
                "top_k_agreement": float,
                "is_fitted?": (bool, None),
                "top_k_agreement_before?": (float, None),
            },
            "refit?": (
                {"is_kept": bool, "error_before": float, "error_after": float, "rounds": int, "steps": int},
                None,
            ),
            "output_error": float,
        }
    ],
    "dropped_tensors": {"*": str},
    "warnings": [str],
    "timings_seconds": {"*": float},
    "peak_memory_bytes": {"*": int},
    "versions": {"*": str, "transformers": str},
}


def _rows(shape: Document) -> Document:
    table = {"overall": shape, "domains": {"*": shape}}
    return {"model": table, "base?": (table, None)}


_TASKS = {"tasks": {"*": {"*": (float, None)}}, "average": (float, None)}
_FILE = {"file": {"name": str, "sha256": str, "tokens": int}}
# Perplexity, agreement, choices, loops and tasks, as "hcsmoe evaluate" keeps them.
MEASURE_SHAPES: Mapping[str, Document] = {
    "perplexity": {**_FILE, "settings": {"window": int}, **_rows({"perplexity": float, "tokens": int})},
    "agreement": {**_FILE, "settings": {"window": int}, **_rows({"kl": float, "top1_agreement": float, "tokens": int})},
    "choices": {**_FILE, **_rows({"accuracy": float, "accuracy_stderr": (float, None), "items": int})},
    "loops": {
        **_FILE,
        "settings": {"prompt_tokens": int, "continuation_tokens": int},
        **_rows({"loop_rate": float, "loop_rate_stderr": (float, None), "prompts": int}),
    },
    "tasks": {"settings": {"tasks": [str]}, "versions": {"lm_eval": str}, "model": _TASKS, "base?": (_TASKS, None)},
}
_COMMON_SETTINGS: Document = {"dtype": str, "device": str}
_COMMON: Document = {
    "base_model?": (_CHECKPOINT, None),
    "versions": {"*": str},
}
EVALUATION_SHAPE = {
    "measures": {
        f"{name}?": {**_COMMON, **shape, "settings": {**_COMMON_SETTINGS, **shape.get("settings", {})}}
        for name, shape in MEASURE_SHAPES.items()
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The model that a result was made from.

    Attributes:
        repo_id: Its repository, ``None`` if it was a folder.
        name: The repository, or the folder without what it lies in.
        revision: Commit of the repository.
        fingerprint: Tells it from every other checkpoint, also from one of the same name.
        model_type: As in its config.
    """

    repo_id: str | None
    name: str
    revision: str | None
    fingerprint: str | None
    model_type: str

    @property
    def url(self) -> str | None:
        """Page of the repository at that commit."""
        if self.repo_id is None:
            return None
        page = f"https://huggingface.co/{self.repo_id}"
        return page if self.revision is None else f"{page}/tree/{self.revision}"

    @property
    def link(self) -> str:
        """Name for Markdown."""
        return f"`{self.name}`" if self.url is None else f"[{self.name}]({self.url})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known of a result.

    Attributes:
        folder_name: Name of its folder.
        repo_id: Repository that it is, or will be, in; ``None`` if that is not known.
        report: ``hcsmoe.json``.
        base: What it was made from.
        inherited: What it inherits from the card of its base.
        config: ``config.json``.
        files: Names of the files in its folder.
        tensors: Names of its tensors; empty if there is no index.
        measures: What was measured of these weights, by kind.
        is_chat: Whether its tokenizer has a chat template.
        has_tokenizer: Whether it has a tokenizer.
    """

    folder_name: str
    repo_id: str | None
    report: Document
    base: Base
    inherited: Inherited
    config: Document
    files: frozenset[str] = frozenset()
    tensors: frozenset[str] = frozenset()
    measures: Document = field(default_factory=dict)
    is_chat: bool = False
    has_tokenizer: bool = True

    @property
    def title(self) -> str:
        """Name of the result."""
        return self.folder_name if self.repo_id is None else self.repo_id.split("/")[-1]

    @property
    def location(self) -> str:
        """What a program loads: the repository, or the folder."""
        return self.repo_id or self.folder_name

    @property
    def method(self) -> Document:
        """Every choice in force."""
        choices: Document = self.report["method"]
        return choices

    @property
    def layout(self) -> Layout:
        """How it is written down."""
        return Layout(self.method["layout"])

    @property
    def is_pruned(self) -> bool:
        """Whether experts were dropped, not merged."""
        return Method(self.method["method"]) is Method.PRUNE

    @property
    def layers(self) -> Sequence[Document]:
        """The MoE layers."""
        layers: Sequence[Document] = self.report["layers"]
        return layers

    @property
    def experts_before(self) -> int:
        """Experts of every MoE layer of the base."""
        count: int = self.report["experts"]["before"]
        return count

    @property
    def refits(self) -> Sequence[Document]:
        """What the refit of each layer did that was kept."""
        found = [layer["refit"] for layer in self.layers if layer.get("refit") is not None]
        return [refit for refit in found if refit["is_kept"]]

    @property
    def changed(self) -> Sequence[Document]:
        """The MoE layers that have fewer distinct experts than before."""
        return [layer for layer in self.layers if experts_of(layer) < self.experts_before]


def experts_of(layer: Document) -> int:
    """Distinct experts that a layer has left."""
    return len({label for label in layer["labels"] if label >= 0})


def name_of(named: Document) -> str:
    """Repository of a checkpoint that a report names, or its folder."""
    return named.get("repo_id") or named.get("path") or "the source"


def read_report(folder: Path) -> Document:
    """Reads and checks ``hcsmoe.json``.

    Raises:
        SourceError: If there is none, or it is damaged or of a version that this program does not read.
    """
    path = folder / REPORT_FILE
    if not path.is_file():
        raise SourceError(
            f"{folder} has no {REPORT_FILE}, and a card says nothing that is not in it.",
            hint="pass the folder that 'hcsmoe convert' wrote",
        )
    report = read_json(path)
    report = upgrade(report)
    version = report.get("schema_version")
    if version != SCHEMA_VERSION:
        raise SourceError(
            f"{path} has schema version {version!r}; this program reads {SCHEMA_VERSION}.", hint="use a newer hcsmoe"
        )
    _check(report, REPORT_SHAPE, path)
    try:
        Method(report["method"]["method"]), Layout(report["method"]["layout"])
    except ValueError as error:
        _damaged(path, str(error))
    if not report["layers"]:
        _damaged(path, "it names no MoE layer")
    return report


def read_measures(folder: Path) -> Document | None:
    """Reads and checks ``hcsmoe-evaluation.json``, ``None`` if there is none.

    Raises:
        SourceError: If it is damaged.
    """
    path = folder / EVALUATION_FILE
    if not path.is_file():
        return None
    document = read_json(path)
    _check(document, EVALUATION_SHAPE, path)
    return document


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        SourceError: If the file holds something else.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        _damaged(path, f"it is no JSON ({error})")
    if not isinstance(content, dict):
        _damaged(path, "it holds no object")
    return content


def _check(document: Document, shape: Any, path: Path) -> None:
    try:
        conform(document, shape, "it")
    except ValueError as error:
        _damaged(path, str(error))


def _damaged(path: Path, reason: str) -> NoReturn:
    raise SourceError(f"{path} is damaged: {reason}.", hint="download it again, or repeat what wrote it")
