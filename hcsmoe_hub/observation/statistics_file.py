"""Calibration statistics in a file: one run of the model serves every later choice of K, method and layout.

A zip archive that is stored, not compressed. ``statistics.json`` says what was observed, ``layer-N.safetensors`` holds
the sums of one MoE layer, the files in ``states-N`` its hidden states, and ``text.safetensors`` the token ids. Every
layer is written as soon as it has run and read when it is needed, so that no more than one is in memory. The archive
has a checksum of every member, which is compared whenever one is read.
"""

import hashlib
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import torch
from safetensors.torch import load
from torch import Tensor

from hcsmoe_hub.calibration.calibration_set import CalibrationSet
from hcsmoe_hub.calibration.plan import CalibrationPlan
from hcsmoe_hub.calibration.sources import is_same_dataset
from hcsmoe_hub.checkpoint.bounded_json import parse_bounded
from hcsmoe_hub.checkpoint.bounded_zip import check_directory
from hcsmoe_hub.errors import CalibrationError, PlanError
from hcsmoe_hub.methods.clustering import LossTable
from hcsmoe_hub.model.source_model import SourceModel
from hcsmoe_hub.observation.statistics import LayerStatistics
from hcsmoe_hub.observation.statistics_content import check_content, check_layer, check_losses, check_text
from hcsmoe_hub.observation.statistics_writer import (
    CONTENT,
    EXPERTS,
    FORMAT,
    IDS,
    LOST,
    MEASURED_IDS,
    MEASURED_STATES,
    OWN_FIELDS,
    TENSORS,
    TEXT,
    VERSION,
    WIDTHS,
)
from hcsmoe_hub.observation.stored_states import LayerStates, as_dtype, call_of, read_states
from hcsmoe_hub.options import CalibrationOptions, Saliency
from hcsmoe_hub.recipe.recipe import Recipe
from hcsmoe_hub.report.validate import conform

ReadT = TypeVar("ReadT")
# Files of earlier versions do not have the others.
_ALWAYS_THERE = tuple(
    field.name for field in fields(LayerStatistics) if field.name not in OWN_FIELDS and field.default is MISSING
)
# What zipfile raises for archives that are damaged, or packed or encrypted in a way that it does not know.
_UNREADABLE = (
    zipfile.BadZipFile,
    zlib.error,
    KeyError,
    OSError,
    NotImplementedError,
    RuntimeError,
    EOFError,
    ValueError,
)
# Which of them a choice of experts to keep is made by.
_NEEDED: Mapping[Saliency, str] = {
    Saliency.MAN: "norm_E",
    Saliency.TOTAL_MASS: "mass_E",
    Saliency.GRAM: "gram_EE",
    Saliency.OMP: "gram_EE",
}


def fingerprint(model: SourceModel) -> str:
    """Identifies a source by its headers and the beginning of routers and experts of two layers."""
    peeked = []
    for block in (model.decoder_blocks[0], model.decoder_blocks[-1]):
        for tensors in (block.router, block.experts):
            names = {tensor.name for tensor in tensors}
            keys = sorted(key for key, target in model.groups[block.layer].targets.items() if target in names)
            peeked += [model.source.tensors[part] for part in model.parts_of(keys[:1] + keys[-1:])]
    return model.source.fingerprint(peeked)


class StatisticsFile:
    """Statistics of an earlier run.

    Attributes:
        path: The file.
        content: What was observed: ``fingerprint`` and name of the source, ``options``, ``plan`` and outcome of the
            ``calibration``, and the ``layers``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # Experts of a layer, once the model is known.
        self._experts: int | None = None
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
            check_directory(self.path)
            with zipfile.ZipFile(self.path) as archive:
                self._check_sizes(archive)
                return read(archive)
        except _UNREADABLE as error:
            raise self._broken(str(error)) from error

    def _check_sizes(self, archive: zipfile.ZipFile) -> None:
        """Checks that nothing in the archive unpacks to more than is there: its own entries are stored as they are."""
        for entry in archive.infolist():
            if entry.file_size > entry.compress_size:
                raise self._broken(f"{entry.filename} is compressed")

    def _read_content(self) -> dict[str, Any]:
        try:
            content = parse_bounded(self._read(CONTENT))
        except ValueError as error:
            raise self._broken(f"{CONTENT} is not JSON") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise self._broken("it does not say what it holds")
        if content.get("version") != VERSION:
            raise CalibrationError(
                f"{self.path} has version {content.get('version')} of its format; this program reads {VERSION}.",
                hint="collect the statistics again, into another file",
            )
        try:
            check_content(content)
        except ValueError as error:
            raise self._broken(f"in {CONTENT}, {error}") from error
        return content

    def layer(self, layer: int) -> LayerStatistics:
        """Reads one MoE layer.

        Raises:
            CalibrationError: If it is damaged.
        """
        try:
            tensors = load(self._read(f"layer-{layer}.safetensors"))
            found = {name: tensors[name] for name in _ALWAYS_THERE}
            found |= {name: tensors[name] for name in TENSORS if name in tensors}
            check_layer(found, self._experts)
            sample = call_of(tensors)
        except (safetensors.SafetensorError, KeyError, ValueError) as error:
            raise self._broken(f"layer {layer} is damaged ({error})") from error
        calibration = self.content["calibration"]
        # An MTP head sees a token less of every sequence.
        missing = calibration["sequences"] if layer in self.content.get("mtp_layers", ()) else 0
        return LayerStatistics(tokens=calibration["tokens"] - missing, sample=sample, **found)

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return self.path.stat().st_size

    @property
    def digest(self) -> str:
        """SHA-256 of what the file says that it holds."""
        return hashlib.sha256(self._read(CONTENT)).hexdigest()

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
        except (safetensors.SafetensorError, ValueError, RuntimeError) as error:
            raise self._broken(f"the hidden states of layer {layer} are damaged ({error})") from error
        return as_dtype(found, self.states_dtype, dtype)

    def text(self) -> CalibrationSet:
        """The token ids that were observed.

        Raises:
            CalibrationError: If they are damaged.
        """
        tensors, described = self._text_tensors(), self.content["text"]
        return CalibrationSet(
            token_ids=tensors[IDS],
            domains=tuple(described["domains"]),
            measured_ids=tensors[MEASURED_IDS],
            measured_domains=tuple(described["measured_domains"]),
            sources=tuple(described["sources"]),
            source_length=self.calibration.source_length,
        )

    def measured_states(self) -> Tensor | None:
        """Hidden states ``[M, S, H]`` of the held-out sequences after the last norm; ``None`` if they did not run."""
        return self._text_tensors().get(MEASURED_STATES)

    def _text_tensors(self) -> dict[str, Tensor]:
        try:
            tensors = load(self._read(TEXT))
            check_text(tensors, self.content)
            return tensors
        except (safetensors.SafetensorError, ValueError) as error:
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
            check_losses(tensors[EXPERTS], tensors[WIDTHS], tensors[LOST])
            experts, widths = (tuple(tensors[axis].tolist()) for axis in (EXPERTS, WIDTHS))
            return LossTable(experts=experts, widths=widths, lost_KW=tensors[LOST].numpy())
        except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
            raise self._broken(f"{name} is damaged ({error})") from error

    def _names(self) -> set[str]:
        return self._reading(lambda archive: set(archive.namelist()))

    def usage(self) -> dict[int, Tensor]:
        """How often the router chose each expert, ``[E]`` int64 by decoder layer."""
        return {layer: self.layer(layer).usage_E for layer in self.content["layers"]}

    @property
    def calibration(self) -> CalibrationPlan:
        """What was fed to the model."""
        return conform(self.content["plan"], CalibrationPlan)

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

    def _check_vocabulary(self, model: SourceModel) -> None:
        """Checks that a model has embeddings for the token ids."""
        if self.has_text:
            text, words = self.text(), model.skeleton.text_config.vocab_size
            highest = max((int(ids.max()) for ids in (text.token_ids, text.measured_ids) if ids.numel()), default=0)
            if highest >= words:
                raise self._broken(f"it holds the token id {highest}, and the vocabulary has {words} tokens")

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
        self._experts = model.settings.experts
        self._check_vocabulary(model)
        defaults = CalibrationOptions()
        # The seed of the method is the same option, and may well be another one.
        for field in (field for field in fields(CalibrationOptions) if field.name != "seed"):
            # Files of earlier versions lack the options that came later.
            asked, found = getattr(options, field.name), self.content["options"].get(field.name)
            is_dataset = field.name == "dataset"
            is_same = is_same_dataset(asked, self.content["calibration"]) if is_dataset else asked == found
            if not is_same and asked != getattr(defaults, field.name):
                raise PlanError(
                    f"{self.path} was collected with {field.name.replace('_', ' ')} {found}, not {asked}.",
                    hint="leave the option out to reuse the file, or name another file to collect statistics again",
                )
