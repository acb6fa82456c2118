"""The result file: what was measured, on what, with which figures; later runs add to it."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hcsmoe_hub.checkpoint.source import Source
from hcsmoe_hub.checkpoint.writer import write_json
from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.machine.versions import tool
from hcsmoe_hub.report import EVALUATION_FILE

SCHEMA_VERSION = 1

Document = dict[str, Any]


def result_path(source: Source, output: Path | None) -> Path:
    """Where results go: beside the model unless another file was named.

    Raises:
        PlanError: If a repository was named and no file, or the file cannot be written.
    """
    if output is None and source.path is None:
        raise PlanError(
            f"{source.label} is a repository, so there is no folder for the figures.", hint="add --output FILE.json"
        )
    path = output if output is not None else Path(str(source.path)) / EVALUATION_FILE
    if path.is_dir():
        raise PlanError(f"{path} is a folder.", hint="name a file with --output")
    if not path.parent.is_dir():
        raise PlanError(f"there is no folder {path.parent} for the figures.", hint="create it, or use another --output")
    # Found out now, not after hours of measuring.
    if not os.access(path.parent, os.W_OK):
        raise PlanError(f"{path.parent} cannot be written to.", hint="name another file with --output")
    return path


def read_results(path: Path) -> Document | None:
    """Earlier results, ``None`` if there are none.

    Raises:
        PlanError: If the file holds something else.
    """
    if not path.exists():
        return None
    try:
        document: Document = json.loads(path.read_text("utf-8"))
        is_ours = document["schema_version"] == SCHEMA_VERSION and isinstance(document["measures"], dict)
        is_ours = is_ours and isinstance(document["model"]["fingerprint"], str)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        is_ours = False
    if not is_ours:
        raise PlanError(
            f"{path} holds no results of this version of hcsmoe.", hint="remove it, or use another --output"
        )
    return document


def merge_results(earlier: Document | None, model: Mapping[str, Any], measures: Mapping[str, Any]) -> Document:
    """Adds measures to those that the same model has.

    Args:
        earlier: What the file held; results of another model are left out.
        model: What was measured.
        measures: What was measured, by kind.
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
