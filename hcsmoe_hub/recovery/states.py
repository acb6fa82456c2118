"""States of a training in the folder of an unfinished result: checkpoints of Trainer, and what is added to them.

A checkpoint counts once a file says that it is complete.
"""

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from hcsmoe_hub.checkpoint.bounded_json import read_object
from hcsmoe_hub.checkpoint.durable import sync_tree, write_json
from hcsmoe_hub.report import RecoveryPoint, RecoveryScore

PARAMETERS_FILE, BEST_FILE, STATE_FILE = "parameters.safetensors", "best.safetensors", "recovery.json"
_CHECKPOINTS = "checkpoint-*"
KEPT_CHECKPOINTS = 2


@dataclass(slots=True, kw_only=True)
class History:
    """What has come of a training so far.

    Attributes:
        text: Digest of the text, held-out sequences included.
        before: Perplexity and divergence of the untrained weights.
        points: Perplexity after so many steps, the untrained weights first.
        kept_step: Steps until the best of them.
        tokens: Tokens that were seen, of all processes together.
        seconds: Time that it took.
        stopped: What has ended it: ``steps``, ``time`` or ``patience``; empty while it runs.
    """

    text: str
    before: RecoveryScore
    points: list[RecoveryPoint] = field(default_factory=list)
    kept_step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    stopped: str = ""

    @property
    def steps(self) -> int:
        """Steps until the last score."""
        return self.points[-1]["step"]

    @property
    def best(self) -> float:
        """Lowest perplexity."""
        return min(point["perplexity"] for point in self.points)

    @property
    def scores_since_best(self) -> int:
        """Scores without an improvement."""
        return sum(point["step"] > self.kept_step for point in self.points)


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A complete checkpoint.

    Attributes:
        folder: Where it is.
        history: What had come of the training.
    """

    folder: Path
    history: History

    def parameters(self) -> dict[str, Tensor]:
        """The trained parameters."""
        return load_file(self.folder / PARAMETERS_FILE)

    def best(self) -> dict[str, Tensor]:
        """The best tensors of the model; empty if the untrained ones are."""
        path = self.folder / BEST_FILE
        return load_file(path) if path.exists() else {}


def write_tensors(folder: Path, parameters: Mapping[str, Tensor], best: Mapping[str, Tensor]) -> None:
    """Writes what Trainer would write the whole model for.

    Args:
        folder: Of a checkpoint.
        parameters: What is trained.
        best: The best tensors of the model, none if the untrained ones are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in parameters.items()}, folder / PARAMETERS_FILE)
    if best:
        save_file({name: value.contiguous() for name, value in best.items()}, folder / BEST_FILE)


def complete(folder: Path, history: History) -> None:
    """Marks a checkpoint as complete once everything else of it is on the disk."""
    sync_tree(folder)
    write_json(folder / STATE_FILE, asdict(history))


def latest(folder: Path) -> Saved | None:
    """The newest complete checkpoint; others that are newer are removed. ``None`` if there is none.

    Args:
        folder: Of all checkpoints.
    """
    found = sorted(folder.glob(_CHECKPOINTS), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for path in found:
        content = read_object(path / STATE_FILE)
        if content is not None:
            return Saved(folder=path, history=History(**content))
        shutil.rmtree(path)
    return None
