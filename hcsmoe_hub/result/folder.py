"""The output folder: locked while a conversion writes to it, and never left in a state that looks complete."""

import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from hcsmoe_hub.checkpoint.sidecars import sidecar_files
from hcsmoe_hub.checkpoint.source import Source
from hcsmoe_hub.checkpoint.tensors import INDEX_FILE
from hcsmoe_hub.checkpoint.writer import (
    INCOMPLETE,
    UNFINISHED,
    Recipient,
    ShardWriter,
    is_occupied,
    write_bytes,
    write_json,
)
from hcsmoe_hub.errors import OutputError
from hcsmoe_hub.methods.merging import NeuronOrigins
from hcsmoe_hub.model.width import neurons_of
from hcsmoe_hub.options import Layout
from hcsmoe_hub.planning.conversion_plan import ConversionPlan
from hcsmoe_hub.planning.mapped_layout import mapped_config
from hcsmoe_hub.planning.neuron_file import describe_neurons, neuron_file
from hcsmoe_hub.planning.own_code import OWN_CODE
from hcsmoe_hub.report import (
    BENCHMARK_FILE,
    EVALUATION_FILE,
    FIGURE_FILE,
    NEURONS_FILE,
    REPORT_FILE,
    SINGULAR_VALUES_FILE,
    ConversionReport,
    NeuronRecord,
)


def _clear(folder: Path) -> None:
    """Removes an old checkpoint, the files that mark it as complete first; the user's other files stay."""
    present = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    sidecars = sidecar_files(present, lambda name: (folder / name).read_text(encoding="utf-8-sig", errors="replace"))
    reports = (REPORT_FILE, NEURONS_FILE, FIGURE_FILE, SINGULAR_VALUES_FILE, EVALUATION_FILE)
    for name in (INDEX_FILE, "config.json", *reports):
        (folder / name).unlink(missing_ok=True)
    _remove_sidecars(folder, sidecars)
    for pattern in ("*.safetensors", f"*{INCOMPLETE}"):
        for file in folder.glob(pattern):
            if file.name != UNFINISHED:
                file.unlink()
    _remove_sidecars(folder, [name for name in (BENCHMARK_FILE,) if (folder / name).is_file()])


def _remove_sidecars(folder: Path, files: Iterable[str]) -> None:
    """Removes sidecars, and sub-folders that become empty."""
    for file in files:
        (folder / file).unlink()
        for parent in (folder / file).parents:
            if parent == folder or any(parent.iterdir()):
                break
            parent.rmdir()


@dataclass(slots=True)
class Claim:
    """An output folder that is locked by one conversion.

    Attributes:
        stays: Whether the result is complete and is kept whatever happens next.
        card: The card of the result, removed with it.
    """

    stays: bool = False
    card: Path | None = None


@contextmanager
def claim_output(plan: ConversionPlan) -> Iterator[Claim]:
    """Creates or clears the output folder and locks it; removes everything again unless the result stays.

    Raises:
        OutputError: If it cannot be made, another conversion has locked it, or it has new content since the plan.
    """
    folder, claim = plan.output, Claim()
    if is_occupied(folder) and not plan.options.overwrite:
        raise OutputError(f"{folder} is no longer empty.", hint="choose another folder with `output`")
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = FileLock(folder / UNFINISHED)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise OutputError(
            f"another conversion is writing to {folder}.", hint="wait for it, or choose another folder with `output`"
        ) from None
    except OSError as error:
        raise OutputError(
            f"nothing can be written to {folder}: {error.strerror}.", hint="choose another folder with `output`"
        ) from error
    try:
        _clear(folder)
        yield claim
    finally:
        if not claim.stays:
            _clear(folder)
            # Code that only the config names is not known without it.
            _remove_sidecars(folder, [file for file in plan.sidecars if (folder / file).is_file()])
            if claim.card is not None:
                claim.card.unlink(missing_ok=True)
        lock.release()
        (folder / UNFINISHED).unlink(missing_ok=True)
        for path in created:
            if not any(path.iterdir()):
                path.rmdir()


@contextmanager
def open_writer(plan: ConversionPlan, recipient: Recipient | None) -> Iterator[ShardWriter]:
    """Opens the shard writer; removes all shards after a failure."""
    writer = ShardWriter(plan.output, plan.shards, recipient)
    try:
        yield writer
    except BaseException:
        writer.abandon()
        raise


def write_neurons(plan: ConversionPlan, origins: Mapping[int, NeuronOrigins]) -> NeuronRecord | None:
    """Writes where the neurons of a result come from.

    Args:
        plan: The conversion.
        origins: By decoder layer.

    Returns:
        What the report says of the file; ``None`` if there is nothing to list.
    """
    if not origins:
        return None
    content = neuron_file(origins)
    write_bytes(plan.output / NEURONS_FILE, content)
    after = next(iter(origins.values())).neuron_CI.shape[1]
    return describe_neurons(content, before=neurons_of(plan.model), after=after)


def write_result(plan: ConversionPlan, writer: ShardWriter, report: ConversionReport) -> None:
    """Writes everything but the weights; the config and the index last, since they mark the result as complete."""
    copy_sidecars(plan.model.source, plan.sidecars, plan.output)
    write_json(plan.output / REPORT_FILE, report.as_dict())
    source = plan.model.source
    config = plan.config
    if plan.recipe.layout is Layout.MAPPED:
        config = mapped_config(config, plan.model, {layer.layer: layer.labels for layer in report.layers})
    if (code := OWN_CODE.get(plan.recipe.layout)) is not None:
        write_bytes(plan.output / code.file, code.source(plan.model).encode())
    if config == source.config:
        # An unchanged config keeps its formatting too.
        write_bytes(plan.output / "config.json", source.fetch("config.json").read_bytes())
    else:
        write_json(plan.output / "config.json", config)
    writer.finish()


def copy_sidecars(source: Source, files: Iterable[str], folder: Path) -> None:
    """Copies sidecar files into the result."""
    for file in files:
        target = folder / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.fetch(file), target)
