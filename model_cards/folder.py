"""Collects the facts of a card from a folder."""

from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hcsmoe_hub.checkpoint.sidecars import has_tokenizer
from hcsmoe_hub.checkpoint.tensors import SINGLE_FILE
from hcsmoe_hub.errors import PlanError, SourceError
from hcsmoe_hub.hub.open import open_source
from hcsmoe_hub.model_cards.facts import Base, Document, Facts, name_of, read_json, read_measures, read_report
from hcsmoe_hub.report import EVALUATION_FILE
from hcsmoe_hub.result.source_card import Inherited

CONFIG_FILE = "config.json"


def read_facts(folder: Path, repo_id: str | None) -> tuple[Facts, list[str]]:
    """Reads what a folder says about its checkpoint; weights are looked at only to tell whose figures there are.

    Args:
        folder: A result of ``hcsmoe convert``.
        repo_id: Repository that it is, or will be, in.

    Returns:
        The facts, and what deserves a second look.

    Raises:
        SourceError: If something is missing or damaged.
        PlanError: If ``repo_id`` is none.
    """
    if repo_id is not None:
        check_repo_id(repo_id)
    report = read_report(folder)
    if not (folder / CONFIG_FILE).is_file():
        raise SourceError(f"{folder} has no {CONFIG_FILE}.", hint="pass the folder that 'hcsmoe convert' wrote")
    files = frozenset(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    source = report["source"]
    measures, warnings = _measures(folder)
    facts = Facts(
        folder_name=folder.resolve().name,
        repo_id=repo_id,
        report=report,
        base=Base(
            repo_id=source.get("repo_id"),
            name=name_of(source),
            revision=source.get("revision"),
            fingerprint=source.get("fingerprint"),
            model_type=source["model_type"],
        ),
        inherited=Inherited.of_source(source),
        config=read_json(folder / CONFIG_FILE),
        files=files,
        tensors=_tensor_names(folder),
        measures=measures,
        is_chat=_has_chat_template(folder, files),
        has_tokenizer=has_tokenizer(files),
    )
    return facts, warnings


def check_repo_id(repo_id: str) -> None:
    """Checks the name of a repository.

    Raises:
        PlanError: If it is none.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PlanError(f"{repo_id!r} is no name of a repository.", hint="write it as user/name") from error


def _measures(folder: Path) -> tuple[Document, list[str]]:
    """Figures of exactly these weights, by kind."""
    document = read_measures(folder)
    if document is None:
        return {}, []
    source = open_source(str(folder))
    if document.get("model", {}).get("fingerprint") != source.fingerprint(source.tensors.values()):
        return {}, [f"the figures in {EVALUATION_FILE} are of other weights, and were left out."]
    measures: Document = document["measures"]
    return measures, []


def _tensor_names(folder: Path) -> frozenset[str]:
    """Names from the index, which outlives shards that were uploaded and deleted, or from the only file."""
    source = open_source(str(folder))
    if source.weight_map is not None:
        return frozenset(source.weight_map)
    return frozenset(source.tensors) if (folder / SINGLE_FILE).is_file() else frozenset()


def _has_chat_template(folder: Path, files: frozenset[str]) -> bool:
    if any(file.startswith("chat_template") for file in files):
        return True
    settings: dict[str, Any] = {}
    if "tokenizer_config.json" in files:
        settings = read_json(folder / "tokenizer_config.json")
    return bool(settings.get("chat_template"))
