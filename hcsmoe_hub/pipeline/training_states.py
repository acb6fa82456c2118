"""What a training of the whole model keeps on the disk, so that a run that was killed goes on from there."""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import Tensor

from hcsmoe_hub.errors import OutputError
from hcsmoe_hub.events import Listener, Warned
from hcsmoe_hub.machine import accelerator
from hcsmoe_hub.machine.allocator import bytes_of
from hcsmoe_hub.methods.distil.text import Pieces
from hcsmoe_hub.methods.distil.training import Progress, Trained, Trainer
from hcsmoe_hub.pipeline.progress import Progress as RunProgress

# Steps of the journal: a state of a training that goes on, and what has come of it.
RUNNING, OUTCOME = "training", "trained"
# States of which the older one is used if the newer one is lost.
KEPT = 2
# A state is saved when this many times as long has passed as saving takes: under 5 % of the time.
PAUSE = 20
# Until the first one has been timed.
ASSUMED_BYTES_PER_SECOND = 500_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """The training with one rate, and what it took to come to it.

    Attributes:
        number: Rates that were tried before.
        steps: Steps that were made with them.
    """

    number: int = 0
    steps: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What the training of a model has come to.

    Attributes:
        rate: Rate of the last attempt.
        kept: Steps until the values that were kept; 0 if none was better than the first ones.
        steps: Steps that were made, of all attempts.
        before: Mean KL divergence per token from the source, in nats, by domain.
        after: The same with what was kept.
    """

    rate: float
    kept: int
    steps: int
    before: Mapping[str, float]
    after: Mapping[str, float]


def overwritten_tensors(progress: RunProgress) -> frozenset[str]:
    """Names of the stored tensors that a training writes, or has written, over those of its layers."""
    return frozenset(name for line in progress.lines(OUTCOME)[-1:] for name in line["tensors"])


def training_identity(trained: Mapping[str, Trained], pieces: Pieces, *, seed: int, rates: Sequence[float]) -> str:
    """Digest of everything that a training depends on, but for the values of the models."""
    parameters = [(name, str(each.start.dtype), list(each.start.shape)) for name, each in trained.items()]
    texts = [pieces.fitted_NL, *pieces.judged.values()]
    text = [(list(ids_NL.shape), hashlib.sha256(bytes_of(ids_NL.contiguous())).hexdigest()) for ids_NL in texts]
    content = [parameters, list(pieces.judged), text, seed, list(rates)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


class TrainingStates:
    """Saves how far a training has come, and what has come of it.

    Saving copies values and changes none, so when it happens has no effect on the result.

    Args:
        progress: Where it is kept, and what an interrupted run has kept.
        emit: Called with a warning if a state cannot be used.
    """

    def __init__(self, progress: RunProgress, emit: Listener) -> None:
        self._progress = progress
        self._emit = emit
        self._start = self._saved = time.monotonic()
        self._earlier = 0.0
        self._cost: float | None = None
        self._number = len(progress.lines(RUNNING))

    @property
    def seconds(self) -> float:
        """Time of this run, and of earlier ones until what it has read of them."""
        return self._earlier + time.monotonic() - self._start

    def outcome(self) -> tuple[Outcome, Mapping[str, Tensor]] | None:
        """What the training has come to, and the tensors to write; ``None`` if it has not ended.

        Raises:
            OutputError: If what was saved has changed since: the shards may hold a part of it.
        """
        lines = self._progress.lines(OUTCOME)
        if not lines:
            return None
        found = self._progress.read(OUTCOME, lines[-1]["sha256"])
        if found is None:
            raise OutputError(
                f"{self._progress.path(OUTCOME)} has changed since it was written, and the shards may already hold a "
                "part of it.",
                hint="begin anew with `restart=True`",
            )
        self._earlier = found["seconds"]
        return Outcome(**found["outcome"]), found["tensors"]

    def latest(self, identity: str) -> tuple[Attempt, Progress | None]:
        """The newest state of a training: which attempt, and how far it had come.

        Args:
            identity: Of the training; states of another one are not used.
        """
        for line in reversed(self._progress.lines(RUNNING)[-KEPT:]):
            found = self._progress.read(line["file"], line["sha256"])
            if found is None:
                path = self._progress.path(line["file"])
                self._emit(Warned(f"{path} has changed since it was written, so the training goes on from before it."))
            elif found["identity"] == identity:
                self._earlier = found["seconds"]
                described = found["progress"]
                return Attempt(**found["attempt"]), None if described is None else Progress(**described)
        return Attempt(), None

    def after_step(self, identity: str, attempt: Attempt, trainer: Trainer) -> None:
        """Saves a training if enough time has passed since that was done last."""
        if not self._progress.is_kept:
            return
        progress = trainer.progress()
        cost = _state_bytes(progress) / ASSUMED_BYTES_PER_SECOND if self._cost is None else self._cost
        if time.monotonic() - self._saved >= PAUSE * cost:
            self._save(identity, attempt, progress)

    def begin(self, identity: str, attempt: Attempt) -> None:
        """Saves that an attempt begins, with the first values."""
        if self._progress.is_kept:
            self._save(identity, attempt, None)

    def _save(self, identity: str, attempt: Attempt, progress: Progress | None) -> None:
        if progress is not None:
            # What the device still has to do is not part of what saving takes.
            accelerator.wait(progress.masters[0].device)
        start = time.monotonic()
        described = None if progress is None else {each.name: getattr(progress, each.name) for each in fields(progress)}
        name = f"{RUNNING}-{self._number % KEPT}"
        # No more than are kept lie on the disk at any moment.
        self._progress.path(name).unlink(missing_ok=True)
        self._keep(
            RUNNING,
            name,
            {"identity": identity, "attempt": asdict(attempt), "seconds": self.seconds, "progress": described},
        )
        self._number += 1
        self._saved = time.monotonic()
        if progress is not None:
            self._cost = self._saved - start

    def finish(self, outcome: Outcome, tensors: Mapping[str, Tensor]) -> None:
        """Saves what the training has come to, before anything of it is written to the shards.

        Args:
            outcome: It.
            tensors: What will be written over the stored tensors, by name; none if nothing was kept.
        """
        if not self._progress.is_kept:
            return
        content = {"outcome": asdict(outcome), "seconds": self.seconds, "tensors": dict(tensors)}
        self._keep(OUTCOME, OUTCOME, content, tensors=list(tensors))
        for number in range(KEPT):
            self._progress.path(f"{RUNNING}-{number}").unlink(missing_ok=True)

    def _keep(self, step: str, name: str, content: Any, **more: Any) -> None:
        sha256 = self._progress.pack(content).write(self._progress.path(name))
        self._progress.append(step, file=name, sha256=sha256, **more)


def _state_bytes(progress: Progress) -> int:
    tensors = [
        *progress.masters,
        *progress.best,
        *(each for kept in progress.moments.values() for each in kept.values()),
    ]
    return sum(tensor.nbytes for tensor in tensors)
