"""The readers of somebody else's files, each as a function of bytes: the subject of fuzzing and of property tests."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from places import EXAMPLE, GOLDEN
from tiny_models import build, options

from hcsmoe_hub import convert
from hcsmoe_hub.checkpoint.config_json import check_aliases, quantization_method, read_settings
from hcsmoe_hub.checkpoint.source import LocalSource
from hcsmoe_hub.checkpoint.tensors import INDEX_FILE, SINGLE_FILE, StoredTensor
from hcsmoe_hub.errors import HcsmoeError
from hcsmoe_hub.model.model_class import build_config
from hcsmoe_hub.model.raw_config import translated_errors
from hcsmoe_hub.observation.statistics_file import StatisticsFile
from hcsmoe_hub.report.read import read_report

Read = Callable[[bytes], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """A reader and what it reads.

    Attributes:
        read: Reads a file of these bytes in a folder; raises an HcsmoeError for one that is damaged.
        seeds: Makes sound files in a folder, to begin with.
        is_archive: Whether it reads zip archives.
    """

    read: Callable[[Path, bytes], Any]
    seeds: Callable[[Path], list[bytes]]
    is_archive: bool = False

    def opened(self, folder: Path) -> Read:
        """The reader on bytes that it takes as a file in ``folder``, without the known failures."""

        def read(data: bytes) -> None:
            with suppress(HcsmoeError):
                self.read(folder, bytes(data))

        return read


def read_header(folder: Path, data: bytes) -> dict[str, StoredTensor]:
    """Tensors of a shard of these bytes."""
    (folder / SINGLE_FILE).write_bytes(data)
    return LocalSource(folder).tensors


def read_index(folder: Path, data: bytes) -> dict[str, str] | None:
    """The map of an index of these bytes, whose shards are looked for."""
    (folder / INDEX_FILE).write_bytes(data)
    source = LocalSource(folder)
    found = source.index
    source.shards  # noqa: B018
    return found


def read_config(folder: Path, data: bytes) -> dict[str, Any]:
    """The config of these bytes, from which transformers builds its own."""
    (folder / "config.json").write_bytes(data)
    source = LocalSource(folder)
    config = source.config
    quantization_method(config)
    with translated_errors(source.label):
        built = build_config(config)
    check_aliases(config, read_settings(built))
    return config


def read_conversion_report(folder: Path, data: bytes) -> dict[str, Any]:
    """The report of these bytes."""
    (folder / "hcsmoe.json").write_bytes(data)
    return read_report(LocalSource(folder).text("hcsmoe.json"), label="hcsmoe.json").as_dict()


def read_statistics(folder: Path, data: bytes) -> dict[str, Any]:
    """All that a statistics file of these bytes holds."""
    path = folder / "a.stats"
    path.write_bytes(data)
    file = StatisticsFile(path)
    file.usage()
    file.losses()
    if file.has_states:
        for layer in file.content["layers"]:
            file.states(layer, torch.float32)
    if file.has_text:
        file.text()
        file.measured_states()
    file.calibration.order(1)
    _ = file.feature_tokens
    return file.content


def _headers(folder: Path) -> list[bytes]:
    small = json.dumps(
        {
            "__metadata__": {"format": "pt"},
            "a.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
            "b.bias": {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]},
        }
    ).encode()
    packed = (
        b'{"q":{"dtype":"F4","shape":[2,4],"data_offsets":[0,4]},"e":{"dtype":"I8","shape":[0],"data_offsets":[4,4]}}'
    )
    return [
        len(small).to_bytes(8, "little") + small + bytes(24),
        len(packed).to_bytes(8, "little") + packed + bytes(4),
        len(b"{}").to_bytes(8, "little") + b"{}",
    ]


def _indexes(folder: Path) -> list[bytes]:
    return [(EXAMPLE / INDEX_FILE).read_bytes(), b'{"weight_map":{"a":"model-00001-of-00001.safetensors"}}']


def _configs(folder: Path) -> list[bytes]:
    found = [(EXAMPLE / "config.json").read_bytes()]
    for kind in ("qwen3_moe", "deepseek_v3", "gpt_oss"):
        found.append((build(folder / kind, kind) / "config.json").read_bytes())
    config = json.loads(found[0])
    quantised = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    found.append(json.dumps({**config, "quantization_config": quantised}).encode())
    return found


def _reports(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((GOLDEN / "cards").glob("*.json"))]


def _statistics(folder: Path) -> list[bytes]:
    source = build(folder / "model")
    convert(source, replace(options(source, 4), statistics=folder / "a.stats", output=folder / "out"))
    return [(folder / "a.stats").read_bytes()]


READERS = {
    "header": Reader(read=read_header, seeds=_headers),
    "index": Reader(read=read_index, seeds=_indexes),
    "config": Reader(read=read_config, seeds=_configs),
    "report": Reader(read=read_conversion_report, seeds=_reports),
    "statistics": Reader(read=read_statistics, seeds=_statistics, is_archive=True),
}
