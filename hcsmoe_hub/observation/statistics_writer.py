"""Writes a statistics file layer by layer, such that a run which is interrupted can go on with it."""

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import IO, Any, TypeAlias

import torch
from safetensors.torch import save
from torch import Tensor

from hcsmoe_hub.calibration.calibration_set import CalibrationSet
from hcsmoe_hub.checkpoint.durable import INCOMPLETE
from hcsmoe_hub.errors import OutputError
from hcsmoe_hub.methods.clustering import LossTable
from hcsmoe_hub.observation.statistics import LayerStatistics
from hcsmoe_hub.observation.stored_states import LayerStates, call_tensors, members_of

FORMAT, VERSION = "hcsmoe-statistics", 1
CONTENT = "statistics.json"
TEXT = "text.safetensors"
OWN_FIELDS = {"tokens", "sample"}
TENSORS = tuple(field.name for field in fields(LayerStatistics) if field.name not in OWN_FIELDS)
IDS, MEASURED_IDS, MEASURED_STATES = "token_ids", "measured_ids", "measured_states"
EXPERTS, WIDTHS, LOST = "experts", "widths", "lost"
# What the list of members of an archive says of one.
_MEMBER_FIELDS = (
    "filename",
    "header_offset",
    "file_size",
    "compress_size",
    "CRC",
    "flag_bits",
    "external_attr",
    "create_version",
    "extract_version",
)
# Size of an unfinished file, and its members since the last mark; JSON.
Mark: TypeAlias = dict[str, Any]


class StatisticsWriter:
    """Writes the layers of one run; see ``open_statistics``."""

    def __init__(self, archive: zipfile.ZipFile, path: Path) -> None:
        self._archive = archive
        self._path = path
        self._marked = len(archive.filelist)

    def add(self, layer: int, statistics: LayerStatistics) -> None:
        """Writes one MoE layer."""
        tensors = {name: getattr(statistics, name) for name in TENSORS}
        assert statistics.sample is not None, "the plan refuses a statistics file for blocks without a sample"
        # What is None is left out.
        stored = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
        self._write(f"layer-{layer}.safetensors", save(stored | call_tensors(statistics.sample)))

    def add_states(self, layer: int, states: LayerStates) -> None:
        """Writes the hidden states of one MoE layer."""
        for name, content in members_of(layer, states):
            self._write(name, content)

    def add_text(self, text: CalibrationSet, measured_MSH: Tensor | None) -> None:
        """Writes the token ids that were observed.

        Args:
            text: The calibration set; its domains and sources belong into what ``describe`` is given.
            measured_MSH: Hidden states of its held-out sequences after the last norm of the source, if they have run.
        """
        tensors = {IDS: text.token_ids, MEASURED_IDS: text.measured_ids}
        if measured_MSH is not None:
            tensors[MEASURED_STATES] = measured_MSH
        self._write(
            TEXT, save({name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()})
        )

    def add_losses(self, layer: int, losses: LossTable) -> None:
        """Writes what fewer and narrower experts of one MoE layer lose."""
        tensors = {
            EXPERTS: torch.tensor(losses.experts),
            WIDTHS: torch.tensor(losses.widths),
            LOST: torch.from_numpy(losses.lost_KW),
        }
        self._write(f"losses-{layer}.safetensors", save(tensors))

    def describe(self, content: Mapping[str, Any]) -> str:
        """Writes what was observed; returns what ``StatisticsFile.digest`` will be."""
        document = json.dumps({"format": FORMAT, "version": VERSION, **content}, indent=2).encode()
        self._write(CONTENT, document)
        return hashlib.sha256(document).hexdigest()

    def mark(self) -> Mark:
        """What there is, so that ``open_statistics`` can go on from here once ``sync`` has brought it to the disk."""
        with _naming(self._path):
            self._file.flush()
        new, self._marked = self._archive.filelist[self._marked :], len(self._archive.filelist)
        members = [[getattr(member, name) for name in _MEMBER_FIELDS] for member in new]
        return {"size": self._archive.start_dir, "members": members}

    def sync(self) -> None:
        """Brings what was marked to the disk."""
        with _naming(self._path):
            os.fsync(self._file.fileno())

    @property
    def _file(self) -> IO[bytes]:
        assert self._archive.fp is not None, "the archive is open"
        return self._archive.fp

    def _write(self, name: str, content: bytes) -> None:
        # A ZipInfo of its own has a fixed date, so that the same statistics are the same bytes.
        with _naming(self._path):
            self._archive.writestr(zipfile.ZipInfo(name), content)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turns failures to write into an error that names the statistics file."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"the statistics file {path} cannot be written: {error}.", hint="choose another file with `statistics`"
        ) from error


@contextmanager
def open_statistics(
    path: Path, *, marks: Sequence[Mark] = (), is_kept: Callable[[], bool] = lambda: False
) -> Iterator[StatisticsWriter]:
    """Opens a statistics file for writing; it gets its name when it is complete.

    Args:
        path: The file.
        marks: What an interrupted run has marked, in order; what it wrote later is written over.
        is_kept: Whether an unfinished file stays after a failure, as a later run can go on from its marks.

    Raises:
        OutputError: If the file cannot be written. Other failures inside the ``with`` block pass through.
    """
    unfinished = unfinished_statistics(path)
    with _naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = unfinished.open("r+b" if marks else "w+b")
        file.truncate(max((mark["size"] for mark in marks), default=0))
    archive = _archive(file, marks)
    try:
        yield StatisticsWriter(archive, path)
        with _naming(path):
            archive.close()
            file.flush()
            os.fsync(file.fileno())
            unfinished.replace(path)
    finally:
        # After a failure the end of the archive is lost anyway.
        with suppress(OSError):
            archive.close()
        with suppress(OSError):
            file.close()
        if not is_kept():
            unfinished.unlink(missing_ok=True)


def unfinished_statistics(path: Path) -> Path:
    """What a statistics file is called until it is complete."""
    return path.with_name(path.name + INCOMPLETE)


def holds(path: Path, marks: Sequence[Mark]) -> bool:
    """Whether an unfinished statistics file holds all that was marked."""
    try:
        return unfinished_statistics(path).stat().st_size >= max((mark["size"] for mark in marks), default=0)
    except OSError:
        return False


def _archive(file: IO[bytes], marks: Sequence[Mark]) -> zipfile.ZipFile:
    """An archive that goes on behind what was marked; a killed process has not written the list of its members."""
    archive = zipfile.ZipFile(file, "w")
    for mark in marks:
        archive.start_dir = mark["size"]
        for values in mark["members"]:
            member = zipfile.ZipInfo(values[0])
            for name, value in zip(_MEMBER_FIELDS, values, strict=True):
                setattr(member, name, value)
            archive.filelist.append(member)
            archive.NameToInfo[member.filename] = member
    return archive
