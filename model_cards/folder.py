"""Collects the data of a card from a folder."""

from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hcsmoe_hub.checkpoint.sidecars import has_tokenizer
from hcsmoe_hub.checkpoint.source import LocalSource
from hcsmoe_hub.checkpoint.tensors import SINGLE_FILE
from hcsmoe_hub.errors import PlanError, SourceError
from hcsmoe_hub.evaluation.measures import Measures
from hcsmoe_hub.evaluation.results import read_evaluation
from hcsmoe_hub.model_cards.card_data import Base, CardData, name_of
from hcsmoe_hub.recipe.read import read_recipe
from hcsmoe_hub.report import EVALUATION_FILE, REPORT_FILE
from hcsmoe_hub.report.read import read_report
from hcsmoe_hub.report.validate import parse_json, read_small
from hcsmoe_hub.result.source_card import Inherited

CONFIG_FILE = "config.json"


def read_card_data(folder: Path, repo_id: str | None, *, name: str | None = None) -> tuple[CardData, list[str]]:
    """Reads what a folder says about its checkpoint; weights only serve to check that measures are theirs.

    Args:
        folder: A result of ``hcsmoe convert``.
        repo_id: Repository that it is, or will be, in.
        name: Name that the folder will have; ``None`` if it has it already.

    Returns:
        The data, and warnings.

    Raises:
        SourceError: If something is missing or damaged.
        PlanError: If ``repo_id`` is not the name of a repository.
    """
    if repo_id is not None:
        check_repo_id(repo_id)
    if not (folder / REPORT_FILE).is_file():
        raise SourceError(
            f"{folder} has no {REPORT_FILE}, which everything in a card comes from.",
            hint="pass the folder that 'hcsmoe convert' wrote",
        )
    report = read_report(_text(folder / REPORT_FILE), label=str(folder / REPORT_FILE))
    if not (folder / CONFIG_FILE).is_file():
        raise SourceError(f"{folder} has no {CONFIG_FILE}.", hint="pass the folder that 'hcsmoe convert' wrote")
    files = frozenset(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    source = report.source
    measures, warnings = _measures(folder)
    found = CardData(
        folder_name=folder.resolve().name if name is None else name,
        repo_id=repo_id,
        report=report,
        recipe=read_recipe(report.method),
        base=Base(
            repo_id=source.get("repo_id"),
            name=name_of(source),
            revision=source.get("revision"),
            fingerprint=source.get("fingerprint"),
            model_type=source["model_type"],
        ),
        inherited=Inherited.of_source(source),
        config=_read_json(folder / CONFIG_FILE),
        files=files,
        tensors=_tensor_names(folder),
        measures=measures,
        is_chat=_has_chat_template(folder, files),
        has_tokenizer=has_tokenizer(files),
    )
    return found, warnings


def check_repo_id(repo_id: str) -> None:
    """Checks the name of a repository.

    Raises:
        PlanError: If it is not valid.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PlanError(f"{repo_id!r} is not the name of a repository.", hint="write it as user/name") from error


def _measures(folder: Path) -> tuple[Measures, list[str]]:
    """Measures of exactly these weights."""
    path = folder / EVALUATION_FILE
    if not path.is_file():
        return Measures(), []
    document, source = read_evaluation(path), LocalSource(folder)
    if document["model"]["fingerprint"] != source.fingerprint(source.tensors.values()):
        return Measures(), [f"the figures in {EVALUATION_FILE} are of other weights, and were left out."]
    measures: Measures = document["measures"]
    return measures, []


def _text(path: Path) -> str:
    try:
        return read_small(path)
    except ValueError as error:
        raise _damaged(path, str(error)) from error


def _read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        SourceError: If the file holds something else.
    """
    try:
        return parse_json(_text(path))
    except ValueError as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, reason: str) -> SourceError:
    return SourceError(f"{path} is damaged: {reason}.", hint="download it again, or repeat what wrote it")


def _tensor_names(folder: Path) -> frozenset[str]:
    """Names from the index, which outlives shards that were pushed and deleted, or from the only file."""
    source = LocalSource(folder)
    if source.index is not None:
        return frozenset(source.index)
    return frozenset(source.tensors) if (folder / SINGLE_FILE).is_file() else frozenset()


def _has_chat_template(folder: Path, files: frozenset[str]) -> bool:
    if any(file.startswith("chat_template") for file in files):
        return True
    settings: dict[str, Any] = {}
    if "tokenizer_config.json" in files:
        settings = _read_json(folder / "tokenizer_config.json")
    return bool(settings.get("chat_template"))
