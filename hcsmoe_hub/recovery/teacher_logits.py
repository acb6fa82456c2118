"""The teacher's logits on disk: it runs over all text once, so that it need not be in memory during the training.

N sequences of L tokens, T of them with logits, P of which are kept.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hcsmoe_hub.calibration.token_ids import fingerprint
from hcsmoe_hub.checkpoint.durable import write_json
from hcsmoe_hub.checkpoint.owner import LOCK, OWNER, OwnedError, owning
from hcsmoe_hub.errors import OutputError, PlanError, VerificationError
from hcsmoe_hub.evaluation.checkpoint import Checkpoint
from hcsmoe_hub.evaluation.scorer import Request, Scorer
from hcsmoe_hub.evaluation.scorers import make_scorers
from hcsmoe_hub.events import Listener, Stage, StageAdvanced, StageFinished, StageResumed, StageStarted
from hcsmoe_hub.machine.units import format_bytes
from hcsmoe_hub.methods.distil.top_k import TopK, keep_top_k
from hcsmoe_hub.recovery.logits_file import LogitsFile, LogitsShape, write_logits
from hcsmoe_hub.recovery.stored_teacher import StoredTeacher, naming_damage
from hcsmoe_hub.report.validate import parse_json, read_small

INDEX = "hcsmoe-logits.json"
VERSION = 1
# About the size of a file before it is compressed: what a killed run has to do again.
FILE_BYTES = 32_000_000
# What a process that writes to the folder, or was killed, has there.
_LOCKS = (LOCK, OWNER)


@dataclass(frozen=True, kw_only=True, eq=False)
class LogitsStore:
    """A folder of logits: those of one teacher on one text, complete or not.

    Attributes:
        folder: The folder; it need not exist.
        teacher: The teacher.
        ids_NL: The text, ``[N, L]`` int64: what is trained on first, then what judges.
        top: P; of a smaller vocabulary all of it.
        temperature: At which the logits are used.
        source_length: Tokens of each sequence that an encoder reads, so that the others alone have logits; 0 for a
            decoder alone.
        text: What the text was made from, by the name that messages use: ``data``, ``seed`` and the like; JSON values.
    """

    folder: Path
    teacher: Checkpoint
    ids_NL: Tensor
    top: int
    temperature: float
    source_length: int = 0
    text: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def shape(self) -> LogitsShape:
        """What is kept of every sequence."""
        vocab_size = self.teacher.vocab_size
        length = self.ids_NL.shape[1] - self.source_length
        return LogitsShape(length=length, count=min(self.top, vocab_size), vocab_size=vocab_size)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides every byte, by the name that messages use; what a person recognises comes first."""
        described = self.teacher.describe()
        return {
            "teacher": described.get("repo_id") or described["path"],
            "teacher's weights": described["fingerprint"],
            **self.text,
            "sequences": len(self.ids_NL),
            "sequence length": self.ids_NL.shape[1],
            **({"tokens of the source": self.source_length} if self.source_length else {}),
            "token ids": fingerprint(self.ids_NL),
            "logits per token": self.shape.count,
            "temperature": self.temperature,
        }

    @property
    def bytes(self) -> int:
        """Its size before compression, which takes off little."""
        return len(self.ids_NL) * self.shape.bytes

    @property
    def missing_bytes(self) -> int:
        """The same of what is still to be written."""
        return (len(self.ids_NL) - self.done) * self.shape.bytes

    @property
    def done(self) -> int:
        """Sequences whose logits are there: the first ones of the text."""
        files = next(number for number in count() if not self._path(number).exists())
        return min(files * self._per_file, len(self.ids_NL))

    @property
    def _per_file(self) -> int:
        return max(1, FILE_BYTES // self.shape.bytes)

    def _path(self, number: int) -> Path:
        return self.folder / f"logits-{number:05d}.arrow"

    def check(self) -> None:
        """Checks that the folder holds these logits, a part of them, or nothing.

        Raises:
            PlanError: If it holds others, or something else.
        """
        hint = "name another folder with `teacher_logits`, or delete this one"
        if self.folder.exists() and not self.folder.is_dir():
            raise PlanError(f"{self.folder} is a file, and the teacher's logits need a folder.", hint=hint)
        index = self.folder / INDEX
        if not index.exists():
            if self.folder.exists() and any(not path.name.startswith(_LOCKS) for path in self.folder.iterdir()):
                raise PlanError(f"{self.folder} holds other files than a teacher's logits.", hint=hint)
            return
        try:
            content = parse_json(read_small(index))
        except ValueError as error:
            raise PlanError(f"{index} is damaged: {error}.", hint=hint) from error
        if content.get("version") != VERSION or not isinstance(content.get("identity"), dict):
            raise PlanError(
                f"{self.folder} has version {content.get('version')!r} of the format of a teacher's logits, and this "
                f"version of hcsmoe reads {VERSION}.",
                hint=hint,
            )
        found = content["identity"]
        for name in [*self.identity, *(name for name in found if name not in self.identity)]:
            before, now = found.get(name), self.identity.get(name)
            if before != now:
                raise PlanError(
                    f"the logits in {self.folder} are of another recovery: {name} is {before!r} there and {now!r} "
                    "here.",
                    hint="name another folder with `teacher_logits`, or use the same teacher, text and options",
                )

    def fill(self, device: torch.device, emit: Listener) -> None:
        """Runs the teacher over the sequences whose logits are not there yet; from memory if it fits.

        Args:
            device: Where it runs.
            emit: Called with downloads and sequences.

        Raises:
            PlanError: If the folder holds something else.
            OutputError: If another process writes to it.
            VerificationError: If the teacher predicts what is not a number.
            OSError: If the disk fails; what was written before stays.
        """
        self.check()
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with owning(self.folder):
                self._fill(device, emit)
        except OwnedError as error:
            raise OutputError(
                f"another process writes the teacher's logits to {self.folder} ({error.owner or 'of unknown name'}).",
                hint="wait until it is done, or name another folder with `teacher_logits`",
            ) from error

    def _fill(self, device: torch.device, emit: Listener) -> None:
        done, total = self.done, len(self.ids_NL)
        emit(StageStarted(Stage.TEACHER, total, self._announcement()))
        start = time.perf_counter()
        if done:
            emit(StageResumed(Stage.TEACHER, done))
        if done < total:
            write_json(self.folder / INDEX, {"version": VERSION, "identity": self.identity})
            (scorer,) = make_scorers([self.teacher], device, stream=False, emit=emit)
            waiting: list[TopK] = []
            for number, kept in self._run(scorer, done):
                waiting.append(kept)
                if len(waiting) == self._per_file or number == total - 1:
                    write_logits(self._path(number // self._per_file), waiting, self.shape)
                    waiting.clear()
                emit(StageAdvanced(Stage.TEACHER))
        emit(StageFinished(Stage.TEACHER, time.perf_counter() - start))

    def _announcement(self) -> str:
        """What will be written, in words; empty if nothing will be."""
        missing = self.missing_bytes
        return f"up to {format_bytes(missing)} of logits go to {self.folder}" if missing else ""

    def _run(self, scorer: Scorer, begin: int) -> Iterator[tuple[int, TopK]]:
        """What is kept of each sequence from a number on, in order: all are of one length."""
        source = self.source_length
        requests = [Request(ids[source:], source=ids[:source]) for ids in self.ids_NL[begin:].tolist()]
        for index, logits_TV in scorer.logits(requests, on_host=False):
            kept = keep_top_k(logits_TV, self.shape.count, self.temperature)
            if not bool(kept.values.isfinite().all()):
                raise VerificationError(
                    f"the predictions of {self.teacher.source.label} are not finite numbers, so nothing can be learned "
                    "from them.",
                    hint="run 'hcsmoe verify' on it, which names a tensor that is not finite",
                )
            yield (
                begin + index,
                TopK(
                    values=kept.values.cpu(),
                    tokens=kept.tokens.cpu(),
                    rest=kept.rest.cpu(),
                    warm_rest=kept.warm_rest.cpu(),
                ),
            )

    def open(self) -> StoredTeacher:
        """Opens the logits, all of which must be there.

        Raises:
            PlanError: If a file is missing or damaged.
        """
        counts = [min(self._per_file, len(self.ids_NL) - begin) for begin in range(0, len(self.ids_NL), self._per_file)]
        paths = [self._path(number) for number in range(len(counts))]
        with naming_damage(self.folder):
            files = [LogitsFile(path, count, self.shape) for path, count in zip(paths, counts, strict=True)]
        return StoredTeacher(self.folder, files, self._per_file)
