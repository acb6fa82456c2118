"""Which files belong to a result, in a folder and in a repository."""

from fnmatch import fnmatch
from pathlib import Path

from hcsmoe_hub.checkpoint.sidecars import is_sidecar, refuse_link_out, sidecar_files
from hcsmoe_hub.checkpoint.source import LocalSource, Source
from hcsmoe_hub.checkpoint.tensors import INDEX_FILE
from hcsmoe_hub.checkpoint.unfinished import refuse_unfinished
from hcsmoe_hub.hub.write_errors import PushError
from hcsmoe_hub.report import (
    CARD_FILE,
    EVALUATION_FILE,
    FIGURE_FILE,
    NEURONS_FILE,
    REPORT_FILE,
    SINGULAR_VALUES_FILE,
)
from hcsmoe_hub.result.verify import check_structure

REPORTS = (REPORT_FILE, NEURONS_FILE, EVALUATION_FILE, FIGURE_FILE, SINGULAR_VALUES_FILE)
EVALUATIONS = ".eval_results/*.yaml"
# Files of other checkpoints that transformers might load instead of the pushed one.
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json")
# Caches and histories that other programs keep in a folder.
HIDDEN = (".cache/*", ".git/*", ".DS_Store", "__pycache__/*")


def check_result(folder: Path) -> Source:
    """Checks that a folder holds a result that can be pushed.

    Args:
        folder: Folder that ``hcsmoe convert`` wrote.

    Raises:
        PushError: If there is no such folder, or it does not hold a result.
        VerificationError: If the result is not complete, or its parts disagree.
        SourceError: If it is not a readable checkpoint, or an unfinished conversion.
    """
    if not folder.is_dir():
        raise PushError(f"there is no folder {folder}.", hint="pass the folder that 'hcsmoe convert' wrote")
    refuse_unfinished(folder)
    if not (folder / REPORT_FILE).is_file():
        raise PushError(
            f"{folder} has no {REPORT_FILE}, so it is not a result of 'hcsmoe convert'.",
            hint="pass the folder that 'hcsmoe convert' wrote; for other folders use 'hf upload'",
        )
    return check_structure(folder).source


def checkpoint_files(source: Source) -> list[Path]:
    """The files of a checked result that are in its folder: weights, config, sidecars, card and reports.

    Args:
        source: A checked result.

    Returns:
        Their paths, the shards first.
    """
    folder = source.path
    assert folder is not None, "results are folders"
    present = source.files()
    named = [CARD_FILE, "config.json", *REPORTS, *([] if source.index is None else [INDEX_FILE])]
    small = {name for name in named if name in present} | set(sidecar_files(present, source.loose_text))
    small |= {name for name in present if fnmatch(name, EVALUATIONS)}
    for name in sorted(small):
        refuse_link_out(folder, name)
    return [path for name in (*source.shards, *sorted(small)) if (path := folder / name).is_file()]


def other_files(folder: Path, files: list[Path]) -> list[str]:
    """Names of the other files in a folder, without the hidden files of other programs."""
    names = set(LocalSource(folder).files()) - {file.relative_to(folder).as_posix() for file in files}
    return sorted(name for name in names if not any(fnmatch(name, pattern) for pattern in HIDDEN))


def is_checkpoint_file(name: str) -> bool:
    """Whether a repository file is part of a checkpoint; False for the card, which the user may have written."""
    if name in ("config.json", *REPORTS) or is_sidecar(name):
        return True
    return "/" not in name and any(fnmatch(name, pattern) for pattern in WEIGHTS)
