"""The output folder: claimed before the first byte, complete with the last one, and never half-finished looking."""

import shutil
from collections.abc import Iterable, Iterator
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
from hcsmoe_hub.options import Layout
from hcsmoe_hub.planning.conversion_plan import ConversionPlan
from hcsmoe_hub.planning.mapped_layout import MODELING_FILE, mapped_config, modeling_source
from hcsmoe_hub.report import EVALUATION_FILE, FIGURE_FILE, REPORT_FILE, ConversionReport

# Written with the card, of figures that a new conversion makes void.
BENCHMARK_FILE = ".eval_results/hcsmoe.yaml"


def _clear(folder: Path) -> None:
    """Removes an old checkpoint; what makes it look complete goes first. Other files of the user stay."""
    for name in (INDEX_FILE, "config.json", REPORT_FILE, FIGURE_FILE, EVALUATION_FILE):
        (folder / name).unlink(missing_ok=True)
    present = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    _remove_sidecars(folder, sidecar_files(present))
    for pattern in ("*.safetensors", f"*{INCOMPLETE}"):
        for file in folder.glob(pattern):
            if file.name != UNFINISHED:
                file.unlink()
    _remove_sidecars(folder, [name for name in (BENCHMARK_FILE,) if (folder / name).is_file()])


def _remove_sidecars(folder: Path, files: Iterable[str]) -> None:
    """Removes sidecars, and the sub-folders that they leave empty."""
    for file in files:
        (folder / file).unlink()
        for parent in (folder / file).parents:
            if parent == folder or any(parent.iterdir()):
                break
            parent.rmdir()


@dataclass(slots=True)
class Claim:
    """An output folder that one conversion has for itself.

    Attributes:
        stays: Whether the result is complete and is to stay, whatever comes after.
        card: The card that belongs to it and goes with it.
    """

    stays: bool = False
    card: Path | None = None


@contextmanager
def claim_output(plan: ConversionPlan) -> Iterator[Claim]:
    """Creates or clears the output folder, and holds it; nothing of this run remains unless its result stays.

    Raises:
        OutputError: If another conversion holds it, or something else came into it.
    """
    folder, claim = plan.output, Claim()
    if is_occupied(folder) and not plan.options.overwrite:
        raise OutputError(f"{folder} is not empty any more.", hint="choose another folder with --output")
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / UNFINISHED)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise OutputError(
            f"another conversion is writing to {folder}.", hint="wait for it, or choose another folder with --output"
        ) from None
    try:
        _clear(folder)
        yield claim
    finally:
        if not claim.stays:
            _clear(folder)
            if claim.card is not None:
                claim.card.unlink(missing_ok=True)
        lock.release()
        (folder / UNFINISHED).unlink(missing_ok=True)
        for path in created:
            if not any(path.iterdir()):
                path.rmdir()


@contextmanager
def writing(plan: ConversionPlan, recipient: Recipient | None) -> Iterator[ShardWriter]:
    """Opens the writer of the shards; after a failure none of them remains."""
    writer = ShardWriter(plan.output, plan.shards, recipient)
    try:
        yield writer
    except BaseException:
        writer.abandon()
        raise


def write_result(plan: ConversionPlan, writer: ShardWriter, report: ConversionReport) -> None:
    """Writes everything beside the weights; the config and the index come last, as the sign of completeness."""
    copy_sidecars(plan.model.source, plan.sidecars, plan.output)
    write_json(plan.output / REPORT_FILE, report.as_dict())
    source = plan.model.source
    config = plan.config
    if plan.recipe.layout is Layout.MAPPED:
        config = mapped_config(config, plan.model, {layer.layer: layer.labels for layer in report.layers})
        write_bytes(plan.output / MODELING_FILE, modeling_source(plan.model).encode())
    if config == source.config:
        # Nothing changed, so not even the formatting should.
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
