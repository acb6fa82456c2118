"""Reads the weights of sources as a conversion does, layer by layer; all calls side by side, see ``Machine.run``."""

import hashlib
import json
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.file_download import repo_folder_name

from hcsmoe_hub.checkpoint.pieces import Step
from hcsmoe_hub.checkpoint.reader import TensorReader
from hcsmoe_hub.checkpoint.source import Source
from hcsmoe_hub.errors import HcsmoeError
from hcsmoe_hub.events import Event, Fetching
from hcsmoe_hub.hub import retry, transfer
from hcsmoe_hub.hub.open import open_source

# Pieces of the example are smaller than a block of the default size.
BLOCK_BYTES = 4096


def steps_of(source: Source) -> list[Step]:
    """What lies outside of the layers, then layer by layer."""
    steps: dict[int, list[Any]] = {}
    for name, tensor in source.tensors.items():
        match = re.search(r"\.layers\.(\d+)\.", name)
        steps.setdefault(int(match[1]) if match else -1, []).append(tensor)
    return [steps[number] for number in sorted(steps)]


def read_all(source: Source, *, low_disk: bool = False, ahead: bool = True) -> dict[str, Any]:
    """Reads every tensor once.

    Args:
        source: What to read.
        low_disk: Whether what was read is deleted.
        ahead: Whether shards are downloaded before they are needed.

    Returns:
        A hash of what was read, and the shards in the order of their downloads.
    """
    digest, events = hashlib.sha256(), list[Event]()
    steps = steps_of(source)
    with (
        source.feed(steps, low_disk=low_disk, emit=events.append) if ahead else nullcontext() as feed,
        TensorReader(source, feed=feed, emit=events.append) as reader,
    ):
        for tensor in (tensor for step in steps for tensor in step):
            digest.update(reader.read(tensor).reshape(-1).view(torch.uint8).numpy())
    fetched = [event.shard for event in events if isinstance(event, Fetching)]
    return {"digest": digest.hexdigest(), "fetched": fetched}


def _clean(source: Source) -> None:
    """Plans with everything in the cache, which somebody then deletes."""
    for shard in source.shards:
        source.fetch(shard)
    assert source.tensors
    assert source.cache is not None
    assert source.repo_id is not None
    shutil.rmtree(source.cache / repo_folder_name(repo_id=source.repo_id, repo_type="model"))


def answer(call: dict[str, Any]) -> Any:
    try:
        if call.pop("snapshot", False):
            return snapshot_download(call.pop("source"), **call)
        low_disk, ahead = call.pop("low_disk", False), call.pop("ahead", True)
        cleaned = call.pop("cleaned", False)
        source = open_source(call.pop("source"), **call)
        if cleaned:
            _clean(source)
        return read_all(source, low_disk=low_disk, ahead=ahead)
    except HcsmoeError as error:
        return {"refused": type(error).__name__, "message": error.message, "hint": error.hint}


def main() -> None:
    calls = json.load(sys.stdin)
    retry.PAUSES_SECONDS = (0.05,) * 4
    transfer.BLOCK_BYTES = BLOCK_BYTES
    if len(calls) == 1:
        # In the main thread, which alone can be interrupted.
        answers = {name: answer(call) for name, call in calls.items()}
    else:
        with ThreadPoolExecutor(len(calls)) as pool:
            answers = dict(zip(calls, pool.map(answer, calls.values()), strict=True))
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
