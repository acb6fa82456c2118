"""Which files make a result, in a folder and in a repository."""

from fnmatch import fnmatch
from pathlib import Path

from hcsmoe_hub.checkpoint.sidecars import sidecar_files
from hcsmoe_hub.checkpoint.source import LocalSource, Source
from hcsmoe_hub.checkpoint.tensors import INDEX_FILE
from hcsmoe_hub.hub.write_errors import PushError
from hcsmoe_hub.report import EVALUATION_FILE, FIGURE_FILE, REPORT_FILE
from hcsmoe_hub.result.verify import check_structure

CARD_FILE = "README.md"
REPORTS = (REPORT_FILE, EVALUATION_FILE, FIGURE_FILE)
EVALUATIONS = ".eval_results/*.yaml"
# Of any checkpoint that transformers would load, or half-load, in place of the one that is pushed.
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json")
# Caches and histories that other programs keep in a folder.
HIDDEN = (".cache/*", ".git/*", ".DS_Store", "__pycache__/*")


def check_result(folder: Path) -> Source:
    """Checks that a folder holds a result that can be pushed.

    Args:
        folder: Folder that ``hcsmoe convert`` wrote.

    Raises:
        PushError: If the folder is none, or holds no result.
        VerificationError: If the result is not complete, or its parts disagree.
        SourceError: If it is no readable checkpoint.
    """
    if not folder.is_dir():
        raise PushError(f"there is no folder {folder}.", hint="pass the folder that 'hcsmoe convert' wrote")
    if not (folder / REPORT_FILE).is_file():
        raise PushError(
            f"{folder} holds no {REPORT_FILE}, so it is no result of 'hcsmoe convert'.",
            hint="pass the folder that 'hcsmoe convert' wrote; 'hf upload' takes any other",
        )
    return check_structure(folder).source


def checkpoint_files(source: Source) -> list[Path]:
    """The files of a checked result that are in its folder: weights, what they need, and what tells of them.

    Args:
        source: A checked result.

    Returns:
        Their paths, the shards first.
    """
    folder = source.path
    assert folder is not None, "results are folders"
    present = source.files()
    named = [CARD_FILE, "config.json", *REPORTS, *([] if source.weight_map is None else [INDEX_FILE])]
    small = {name for name in named if name in present} | set(sidecar_files(present))
    small |= {name for name in present if fnmatch(name, EVALUATIONS)}
    return [path for name in (*source.shards, *sorted(small)) if (path := folder / name).is_file()]


def other_files(folder: Path, files: list[Path]) -> list[str]:
    """Names of the files of a folder that are not among some; what programs hide there is left out."""
    names = set(LocalSource(folder).files()) - {file.relative_to(folder).as_posix() for file in files}
    return sorted(name for name in names if not any(fnmatch(name, pattern) for pattern in HIDDEN))


def is_of_a_checkpoint(name: str) -> bool:
    """Whether a file of a repository is part of the checkpoint there; a card may be the user's, and is not."""
    if name in ("config.json", *REPORTS) or sidecar_files([name]):
        return True
    return "/" not in name and any(fnmatch(name, pattern) for pattern in WEIGHTS)
