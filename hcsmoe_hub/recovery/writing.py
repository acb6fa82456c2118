"""Writes a recovered result: the files of the result, but for the tensors that training has changed."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from hcsmoe_hub.checkpoint.durable import copy_file, write_json
from hcsmoe_hub.checkpoint.reader import TensorReader
from hcsmoe_hub.checkpoint.sidecars import sidecar_files
from hcsmoe_hub.checkpoint.source import Source
from hcsmoe_hub.checkpoint.tensors import INDEX_FILE
from hcsmoe_hub.checkpoint.writer import overwrite_tensor
from hcsmoe_hub.recovery.models import Opened
from hcsmoe_hub.report import FIGURE_FILE, NEURONS_FILE, REPORT_FILE, SINGULAR_VALUES_FILE, RecoveryRecord
from hcsmoe_hub.result.commit import CONFIG_FILE
from hcsmoe_hub.result.folder import copy_sidecars
from hcsmoe_hub.result.verify import check_structure


def changed_tensors(opened: Opened, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of some stored tensors that differ from what the result holds, by name."""
    source = opened.result.source
    with TensorReader(source) as reader:
        return {name: tensor for name, tensor in tensors.items() if not tensor.equal(reader.read(source.tensors[name]))}


def write_recovered(opened: Opened, tensors: Mapping[str, Tensor], record: RecoveryRecord, folder: Path) -> None:
    """Writes everything but the card.

    Args:
        opened: The result, and what its report says.
        tensors: What has changed, by stored name.
        record: What the recovery did.
        folder: Where the files are until they are complete.

    Raises:
        VerificationError: If what was written is not a sound checkpoint.
    """
    source = opened.result.source
    # Of a run that was interrupted here.
    shutil.rmtree(folder)
    folder.mkdir()
    for shard in source.shards:
        copy_file(source.fetch(shard), folder / shard)
    for name, tensor in tensors.items():
        overwrite_tensor(folder, source.tensors[name], tensor)
    copy_sidecars(source, _other_files(source), folder)
    write_json(folder / REPORT_FILE, replace(opened.report, recovery=record).as_dict())
    check_structure(folder)


def _other_files(source: Source) -> list[str]:
    """Everything of a result but its shards, its report, and what was written about the weights that it had."""
    files = source.files()
    sidecars = sidecar_files(files, lambda name: source.fetch(name).read_text("utf-8-sig", errors="replace"))
    wanted = {CONFIG_FILE, INDEX_FILE, FIGURE_FILE, NEURONS_FILE, SINGULAR_VALUES_FILE, *sidecars}
    return [file for file in files if file in wanted]
