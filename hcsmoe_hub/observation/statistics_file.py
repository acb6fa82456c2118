"""Calibration statistics in a file: one run of the model serves every later choice of K, method and layout.

A zip archive that is stored, not compressed: ``statistics.json`` says what was observed, ``layer-N.safetensors`` holds
one MoE layer. Every layer is written as soon as it has run, so that no more than one is in memory.
"""

import json
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load, save
from torch import Tensor

from hcsmoe_hub.calibration.plan import CalibrationPlan
from hcsmoe_hub.calibration.sources import is_same_dataset
from hcsmoe_hub.checkpoint.writer import INCOMPLETE
from hcsmoe_hub.errors import CalibrationError, OutputError, PlanError
from hcsmoe_hub.model.source_model import SourceModel
from hcsmoe_hub.observation.statistics import Call, LayerStatistics
from hcsmoe_hub.options import CalibrationOptions, Saliency
from hcsmoe_hub.recipe.recipe import Recipe

FORMAT, VERSION = "hcsmoe-statistics", 1
CONTENT = "statistics.json"
_FIELDS = ("usage_E", "routing_score_E", "saliency_E", "outputs_EH", "logits_gram_EE")
# What files of earlier versions do not have.
_LATER_FIELDS = ("mass_E", "norm_E", "gram_EE")
_DESCRIBED = {"fingerprint", "source", "options", "plan", "calibration", "layers"}
# Which of them a choice of experts to keep is made by.
_NEEDED: Mapping[Saliency, str] = {
    Saliency.MAN: "norm_E",
    Saliency.TOTAL_MASS: "mass_E",
    Saliency.GRAM: "gram_EE",
    Saliency.OMP: "gram_EE",
}
_INPUT, _NAMED_INPUT = "input.", "named_input."


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
        tensors = {name: getattr(statistics, name) for name in (*_FIELDS, *_LATER_FIELDS)}
        assert statistics.sample is not None, "the plan refuses a statistics file for blocks without a sample"
        for number, value in enumerate(statistics.sample.args):
            tensors[f"{_INPUT}{number}"] = value
        for name, value in statistics.sample.kwargs.items():
            tensors[f"{_NAMED_INPUT}{name}"] = value
        # What is None is left out.
        stored = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
        self._write(f"layer-{layer}.safetensors", save(stored))

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
        try:
            with zipfile.ZipFile(self.path) as archive:
                return archive.read(name)
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
            fields = {name: tensors[name] for name in _FIELDS}
            fields |= {name: tensors[name] for name in _LATER_FIELDS if name in tensors}
        except (safetensors.SafetensorError, KeyError) as error:
            raise self._broken(f"layer {layer} is damaged ({error})") from error
        # An input that was None is not in the file.
        numbers = [int(name.removeprefix(_INPUT)) for name in tensors if name.startswith(_INPUT)]
        args = [tensors.get(f"{_INPUT}{number}") for number in range(max(numbers, default=-1) + 1)]
        kwargs = {name.removeprefix(_NAMED_INPUT): tensors[name] for name in tensors if name.startswith(_NAMED_INPUT)}
        calibration = self.content["calibration"]
        # An MTP head sees a token less of every sequence.
        missing = calibration["sequences"] if layer in self.content.get("mtp_layers", ()) else 0
        return LayerStatistics(tokens=calibration["tokens"] - missing, sample=Call(tuple(args), kwargs), **fields)

    def usage(self) -> dict[int, Tensor]:
        """How often the router chose each expert, ``[E]`` int64 by decoder layer."""
        return {layer: self.layer(layer).usage_E for layer in self.content["layers"]}

    @property
    def calibration(self) -> CalibrationPlan:
        """What was fed to the model."""
        return CalibrationPlan(**self.content["plan"])

    @property
    def feature_tokens(self) -> int:
        """Tokens that were kept of every layer, at most."""
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
