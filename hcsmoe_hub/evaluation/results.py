"""The result file of evaluations, its one reader and its one writer; later runs add to it."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hcsmoe_hub.checkpoint.durable import write_json
from hcsmoe_hub.checkpoint.source import Source
from hcsmoe_hub.errors import PlanError, SourceError
from hcsmoe_hub.evaluation.measures import Evaluation
from hcsmoe_hub.machine.versions import tool
from hcsmoe_hub.report import EVALUATION_FILE
from hcsmoe_hub.report.validate import conform, parse_json, read_small

SCHEMA_VERSION = 1

Document = dict[str, Any]


def result_path(source: Source, output: Path | None) -> Path:
    """Where results go: next to the weights unless another file was named.

    Raises:
        PlanError: If a repository was named and no file, or the file cannot be written.
    """
    if output is None and source.path is None:
        raise PlanError(
            f"{source.label} is a repository, so there is no folder for the figures.", hint="add `output='FILE.json'`"
        )
    path = output if output is not None else Path(str(source.path)) / EVALUATION_FILE
    if path.is_dir():
        raise PlanError(f"{path} is a folder.", hint="name a file with `output`")
    if not path.parent.is_dir():
        raise PlanError(f"there is no folder {path.parent} for the figures.", hint="create it, or use another `output`")
    # Found out now, not after hours of measuring.
    if not os.access(path.parent, os.W_OK):
        raise PlanError(f"{path.parent} cannot be written to.", hint="name another file with `output`")
    return path


def read_evaluation(path: Path) -> Document:
    """Reads and checks a result file.

    Raises:
        SourceError: If the file is damaged, or of a version that this program does not read.
    """
    try:
        document: Document = parse_json(read_small(path))
        version = document.get("schema_version", SCHEMA_VERSION)
        if version == SCHEMA_VERSION:
            # Checked, and returned as it is: a file keeps keys that only the program that wrote them knows.
            conform(document, Evaluation)
            return document
    except ValueError as error:
        raise SourceError(f"{path} is damaged: {error}.", hint="remove it, and run 'hcsmoe evaluate' again") from error
    raise SourceError(
        f"{path} has schema version {version!r}, and this version of hcsmoe reads {SCHEMA_VERSION}.",
        hint="use a newer hcsmoe",
    )


def read_results(path: Path) -> Document | None:
    """Earlier results, ``None`` if there are none.

    Raises:
        PlanError: If the file cannot be read as one of this version.
    """
    if not path.exists():
        return None
    try:
        return read_evaluation(path)
    except SourceError as error:
        raise PlanError(
            f"{path} holds no results that new ones could be added to: {error.message}",
            hint="remove it, or use another `output`",
        ) from error


def merge_results(earlier: Document | None, model: Mapping[str, Any], measures: Mapping[str, Any]) -> Document:
    """Adds measures to those that the same model has.

    Args:
        earlier: What the file held; results of another model are left out.
        model: The checkpoint that was measured.
        measures: Its measures, by kind.
    """
    is_same = earlier is not None and earlier["model"]["fingerprint"] == model["fingerprint"]
    kept = earlier["measures"] if earlier is not None and is_same else {}
    return {
        "schema_version": SCHEMA_VERSION,
        "tool": tool(),
        "model": dict(model),
        "measures": {**kept, **measures},
    }


def write_results(path: Path, document: Document) -> None:
    """Writes the file under a temporary name, then renames it."""
    write_json(path, document)
