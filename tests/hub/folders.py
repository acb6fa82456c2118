"""Folders to push; their content need not be a real model."""

import json
import os
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

SHARD_BYTES = 300_000
SHARDS = tuple(f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3))
CARD = "---\nlicense: mit\n---\n# A model\n"
SMALL = {"config.json": "{}", "hcsmoe.json": '{"schema_version": 1}', "README.md": CARD}


_HEADER_BYTES = 128
_SIZE = SHARD_BYTES - _HEADER_BYTES
_ENTRIES = {"w": {"dtype": "U8", "shape": [_SIZE], "data_offsets": [0, _SIZE]}}
_HEADER = (_HEADER_BYTES - 8).to_bytes(8, "little") + json.dumps(_ENTRIES).ljust(_HEADER_BYTES - 8).encode()


def write_folder(folder: Path, changes: Mapping[str, str] = MappingProxyType({}), *, seed: int = 0) -> Path:
    """Writes three shards of random bytes, and small files, some of them with other content; returns the folder."""
    folder.mkdir(parents=True)
    chance = random.Random(seed)
    for shard in SHARDS:
        (folder / shard).write_bytes(_HEADER + chance.randbytes(SHARD_BYTES - len(_HEADER)))
    for name, text in (SMALL | dict(changes)).items():
        (folder / name).write_text(text)
    return folder


def read_folder(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def files_under(folder: Path) -> Iterator[Path]:
    """Every file below a folder, while others write and delete there: what vanishes meanwhile is left out."""
    for place, _, names in os.walk(folder):
        for name in names:
            yield Path(place, name)
