"""The output folder: claimed before the first byte, complete with the last one, and never half-finished looking."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hcsmoe_hub.checkpoint.sidecars import copy_sidecars, sidecar_files
from hcsmoe_hub.checkpoint.tensors import INDEX_FILE
from hcsmoe_hub.checkpoint.writer import INCOMPLETE, ShardWriter, write_bytes, write_json
from hcsmoe_hub.errors import OutputError
from hcsmoe_hub.layouts.mapped import MODELING_FILE, mapped_config, modeling_source
from hcsmoe_hub.options import Layout
from hcsmoe_hub.plan import ConversionPlan
from hcsmoe_hub.report import EVALUATION_FILE, FIGURE_FILE, REPORT_FILE, ConversionReport


def _clear(folder: Path) -> None:
    """Removes an old checkpoint; what makes it look complete goes first. Other files of the user stay."""
    for name in (INDEX_FILE, "config.json", REPORT_FILE, FIGURE_FILE, EVALUATION_FILE):
        (folder / name).unlink(missing_ok=True)
    present = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    _remove_sidecars(folder, sidecar_files(present))
    for pattern in ("*.safetensors", f"*{INCOMPLETE}"):
        for file in folder.glob(pattern):
            file.unlink()


def _remove_sidecars(folder: Path, files: Iterable[str]) -> None:
    """Removes sidecars, and the sub-folders that they leave empty."""
    for file in files:
        (folder / file).unlink()
        for parent in (folder / file).parents:
            if parent == folder or any(parent.iterdir()):
                break
            parent.rmdir()


@contextmanager
def claim_output(plan: ConversionPlan) -> Iterator[ShardWriter]:
    """Creates or clears the output folder and opens the writer; after a failure nothing of this run remains."""
    folder = plan.output
    if folder.is_dir() and any(folder.iterdir()) and not plan.options.overwrite:
        raise OutputError(f"{folder} is not empty any more.", hint="choose another folder with --output")
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    _clear(folder)
    writer = ShardWriter(folder, plan.layout)
    try:
        yield writer
    except BaseException:
        writer.abandon()
        _clear(folder)
        for path in created:
            if not any(path.iterdir()):
                path.rmdir()
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
