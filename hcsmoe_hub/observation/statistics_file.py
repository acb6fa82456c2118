"""Calibration statistics in a file: one run of the model serves every later choice of K, method and layout.

A zip archive that is stored, not compressed. ``statistics.json`` says what was observed, ``layer-N.safetensors`` holds
the sums of one MoE layer, the files in ``states-N`` its hidden states, and ``text.safetensors`` the token ids. Every
layer is written as soon as it has run and read when it is needed, so that no more than one is in memory. The archive
has a checksum of every member, which is compared whenever one is read.
"""

import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import torch
from safetensors.torch import load, save
from torch import Tensor

from hcsmoe_hub.calibration.calibration_set import CalibrationSet
from hcsmoe_hub.calibration.plan import CalibrationPlan
from hcsmoe_hub.calibration.sources import is_same_dataset
from hcsmoe_hub.checkpoint.writer import INCOMPLETE
from hcsmoe_hub.errors import CalibrationError, OutputError, PlanError
from hcsmoe_hub.methods.clustering import LossTable
from hcsmoe_hub.model.source_model import SourceModel
from hcsmoe_hub.observation.statistics import LayerStatistics
from hcsmoe_hub.observation.stored_states import LayerStates, as_dtype, call_of, call_tensors, members_of, read_states
from hcsmoe_hub.options import CalibrationOptions, Saliency
from hcsmoe_hub.recipe.recipe import Recipe

ReadT = TypeVar("ReadT")
FORMAT, VERSION = "hcsmoe-statistics", 1
CONTENT = "statistics.json"
TEXT = "text.safetensors"
_OWN_FIELDS = {"tokens", "sample"}
_TENSORS = tuple(field.name for field in fields(LayerStatistics) if field.name not in _OWN_FIELDS)
# Files of earlier versions do not have the others.
_ALWAYS_THERE = tuple(
    field.name for field in fields(LayerStatistics) if field.name not in _OWN_FIELDS and field.default is MISSING
)
_DESCRIBED = {"fingerprint", "source", "options", "plan", "calibration", "layers"}
# Which of them a choice of experts to keep is made by.
_NEEDED: Mapping[Saliency, str] = {
    Saliency.MAN: "norm_E",
    Saliency.TOTAL_MASS: "mass_E",
    Saliency.GRAM: "gram_EE",
    Saliency.OMP: "gram_EE",
}
_IDS, _MEASURED_IDS, _MEASURED_STATES = "token_ids", "measured_ids", "measured_states"
_EXPERTS, _WIDTHS, _LOST = "experts", "widths", "lost"


def fingerprint(model: SourceModel) -> str:
    """Identifies a source by its headers and the beginning of routers and experts of two layers."""
    peeked = []
    for block in (model.decoder_blocks[0], model.decoder_blocks[-1]):
        for tensors in (block.router, block.experts):
            names = {tensor.name for tensor in tensors}
            keys = sorted(key for key, target in model.groups[block.layer].targets.items() if target in names)
            peeked += [model.source.tensors[part] for part in model.parts_of(keys[:1] + keys[-1:])]
    return model.source.fingerprint(peeked)


class StatisticsWriter:
    """Writes the layers of one run; see ``open_statistics``."""

    def __init__(self, archive: zipfile.ZipFile, path: Path) -> None:
        self._archive = archive
        self._path = path

    def add(self, layer: int, statistics: LayerStatistics) -> None:
        """Writes one MoE layer."""
        tensors = {name: getattr(statistics, name) for name in _TENSORS}
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
        tensors = {_IDS: text.token_ids, _MEASURED_IDS: text.measured_ids}
        if measured_MSH is not None:
            tensors[_MEASURED_STATES] = measured_MSH
        self._write(
            TEXT, save({name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()})
        )

    def add_losses(self, layer: int, losses: LossTable) -> None:
        """Writes what fewer and narrower experts of one MoE layer lose."""
        tensors = {
            _EXPERTS: torch.tensor(losses.experts),
            _WIDTHS: torch.tensor(losses.widths),
            _LOST: torch.from_numpy(losses.lost_KW),
        }
        self._write(f"losses-{layer}.safetensors", save(tensors))

    def describe(self, content: Mapping[str, Any]) -> None:
        """Writes what was observed."""
        document = {"format": FORMAT, "version": VERSION, **content}
        self._write(CONTENT, json.dumps(document, indent=2).encode())

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
def open_statistics(path: Path) -> Iterator[StatisticsWriter]:
    """Opens a statistics file for writing; it gets its name when it is complete, and nothing is left after a failure.

    Raises:
        OutputError: If the file cannot be written. Other failures inside the ``with`` block pass through.
    """
    unfinished = path.with_name(path.name + INCOMPLETE)
    with _naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        archive = zipfile.ZipFile(unfinished, "w")
    try:
        yield StatisticsWriter(archive, path)
        with _naming(path):
            archive.close()
            unfinished.replace(path)
    finally:
        # After a failure the end of the archive is lost anyway.
        with suppress(OSError):
            archive.close()
        unfinished.unlink(missing_ok=True)


class StatisticsFile:
    """Statistics of an earlier run.

    Attributes:
        path: The file.
        content: What was observed: ``fingerprint`` and name of the source, ``options``, ``plan`` and outcome of the
            ``calibration``, and the ``layers``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content = self._read_content()

    def _broken(self, why: str) -> CalibrationError:
        return CalibrationError(
            f"{self.path} is not a statistics file of hcsmoe: {why}.",
            hint="delete it, or choose another one with `statistics`",
        )

    def _read(self, name: str) -> bytes:
        return self._reading(lambda archive: archive.read(name))

    def _reading(self, read: Callable[[zipfile.ZipFile], ReadT]) -> ReadT:
        """What ``read`` finds in the archive."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                return read(archive)
        except (zipfile.BadZipFile, KeyError, OSError, NotImplementedError) as error:
            raise self._broken(str(error)) from error

    def _read_content(self) -> dict[str, Any]:
        try:
            content = json.loads(self._read(CONTENT))
        except ValueError as error:
            raise self._broken(f"{CONTENT} is not JSON") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise self._broken("it does not say what it holds")
        if content.get("version") != VERSION:
            raise CalibrationError(
                f"{self.path} has version {content.get('version')} of its format; this program reads {VERSION}.",
                hint="collect the statistics again, into another file",
            )
        missing = sorted(_DESCRIBED - content.keys())
        if missing:
            raise self._broken(f"{CONTENT} has no {missing[0]!r}")
        return content

    def layer(self, layer: int) -> LayerStatistics:
        """Reads one MoE layer.

        Raises:
            CalibrationError: If it is damaged.
        """
        try:
            tensors = load(self._read(f"layer-{layer}.safetensors"))
            found = {name: tensors[name] for name in _ALWAYS_THERE}
            found |= {name: tensors[name] for name in _TENSORS if name in tensors}
        except (safetensors.SafetensorError, KeyError) as error:
            raise self._broken(f"layer {layer} is damaged ({error})") from error
        calibration = self.content["calibration"]
        # An MTP head sees a token less of every sequence.
        missing = calibration["sequences"] if layer in self.content.get("mtp_layers", ()) else 0
        return LayerStatistics(tokens=calibration["tokens"] - missing, sample=call_of(tensors), **found)

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return self.path.stat().st_size

    @property
    def has_states(self) -> bool:
        """Whether the hidden states of every MoE layer are there."""
        return self.states_dtype is not None

    @property
    def states_dtype(self) -> torch.dtype | None:
        """Dtype that the hidden states were computed in; ``None`` without any."""
        name = self.content.get("states_dtype")
        return None if name is None else getattr(torch, name)

    @property
    def has_text(self) -> bool:
        """Whether the token ids are there; earlier versions did not keep them."""
        return "text" in self.content

    def states(self, layer: int, dtype: torch.dtype) -> LayerStates:
        """Reads the hidden states of one MoE layer.

        Args:
            layer: Its index.
            dtype: What the machine computes in.

        Raises:
            CalibrationError: If they are damaged.
        """
        assert self.states_dtype is not None, "only what is there is asked for"
        try:
            found = self._reading(lambda archive: read_states(layer, archive.namelist(), archive.read))
        except safetensors.SafetensorError as error:
            raise self._broken(f"the hidden states of layer {layer} are damaged ({error})") from error
        return as_dtype(found, self.states_dtype, dtype)

    def text(self) -> CalibrationSet:
        """The token ids that were observed.

        Raises:
            CalibrationError: If they are damaged.
        """
        tensors, described = self._text_tensors(), self.content["text"]
        return CalibrationSet(
            token_ids=tensors[_IDS],
            domains=tuple(described["domains"]),
            measured_ids=tensors[_MEASURED_IDS],
            measured_domains=tuple(described["measured_domains"]),
            sources=tuple(described["sources"]),
        )

    def measured_states(self) -> Tensor | None:
        """Hidden states ``[M, S, H]`` of the held-out sequences after the last norm; ``None`` if they did not run."""
        return self._text_tensors().get(_MEASURED_STATES)

    def _text_tensors(self) -> dict[str, Tensor]:
        try:
            return load(self._read(TEXT))
        except safetensors.SafetensorError as error:
            raise self._broken(f"its token ids are damaged ({error})") from error

    def losses(self) -> dict[int, LossTable] | None:
        """What fewer and narrower experts of every MoE layer lose; ``None`` in files that were collected without it.

        Raises:
            CalibrationError: If a layer is damaged.
        """
        names = {layer: f"losses-{layer}.safetensors" for layer in self.content["layers"]}
        if not self._names() >= set(names.values()):
            return None
        return {layer: self._losses(name) for layer, name in names.items()}

    def _losses(self, name: str) -> LossTable:
        try:
            tensors = load(self._read(name))
            experts, widths = (tuple(tensors[axis].tolist()) for axis in (_EXPERTS, _WIDTHS))
            return LossTable(experts=experts, widths=widths, lost_KW=tensors[_LOST].numpy())
        except (safetensors.SafetensorError, KeyError) as error:
            raise self._broken(f"{name} is damaged ({error})") from error

    def _names(self) -> set[str]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                return set(archive.namelist())
        except (zipfile.BadZipFile, OSError) as error:
            raise self._broken(str(error)) from error

    def usage(self) -> dict[int, Tensor]:
        """How often the router chose each expert, ``[E]`` int64 by decoder layer."""
        return {layer: self.layer(layer).usage_E for layer in self.content["layers"]}

    @property
    def calibration(self) -> CalibrationPlan:
        """What was fed to the model."""
        return CalibrationPlan(**self.content["plan"])

    @property
    def feature_tokens(self) -> int:
        """Tokens of the sample of every layer, at most."""
        return int(self.content["options"]["feature_tokens"])

    def check_scores(self, recipe: Recipe) -> None:
        """Checks that the file holds what a recipe keeps experts by.

        Raises:
            PlanError: If an earlier version wrote it, which did not observe that.
        """
        field = None if recipe.saliency is None else _NEEDED.get(recipe.saliency)
        if field is not None and getattr(self.layer(self.content["layers"][0]), field) is None:
            raise PlanError(
                f"{self.path} was collected by an earlier version, which did not observe what "
                f"`saliency='{recipe.saliency}'` ranks experts by.",
                hint="name another file to collect statistics again, or use `saliency='reap'`",
            )

    def check(self, model: SourceModel, options: CalibrationOptions) -> None:
        """Checks that the statistics are those of a source and of the calibration that was asked for, if any was.

        Raises:
            PlanError: If they are not.
        """
        if fingerprint(model) != self.content["fingerprint"]:
            raise PlanError(
                f"the statistics in {self.path} come from {self.content['source']}, whose config or weights differ "
                f"from those of {model.source.label}.",
                hint="name a file that does not exist yet, and it will be written",
            )
        if {block.layer for block in model.blocks} - set(self.content["layers"]):
            raise PlanError(
                f"{self.path} was collected without the MTP head of {model.source.label}.",
                hint="add `mtp='drop'`, or name another file to collect statistics again",
            )
        defaults = CalibrationOptions()
        # The seed of the method is the same option, and may well be another one.
        for field in (field for field in fields(CalibrationOptions) if field.name != "seed"):
            asked, found = getattr(options, field.name), self.content["options"][field.name]
            is_dataset = field.name == "dataset"
            is_same = is_same_dataset(asked, self.content["calibration"]) if is_dataset else asked == found
            if not is_same and asked != getattr(defaults, field.name):
                raise PlanError(
                    f"{self.path} was collected with {field.name.replace('_', ' ')} {found}, not {asked}.",
                    hint="leave the option out to reuse the file, or name another file to collect statistics again",
                )
