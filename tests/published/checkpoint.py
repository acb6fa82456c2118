"""A published checkpoint as it stands on the Hub, and folders that look like it."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from published.collector import Config, Fp8, Tensors, TensorSpec
from published.random_weights import random_tensor
from published.sizes import EXPERTS, depth, merged, shallow, tiny

CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A published checkpoint.

    Attributes:
        repo: Its repository; the file in ``configs/`` has the name that follows the slash.
        tensors: Adds the tensors that belong to a config.
        billions: Published number of parameters of everything that is stored, in units of 1e9.
        fp8: How it stores matrices in FP8; ``None`` if it does not.
        dtype: Dtype of most of the other tensors.
        files: Further files, with their text, or with the number of their bytes.
        changes: Keys of its config that differ from the file.
        layers: Decoder layers of the tiny checkpoint.
        tiny: What the tiny checkpoint's config needs besides ``sizes.TINY``.
    """

    repo: str
    tensors: Callable[[Tensors, Config], None]
    billions: float
    fp8: Fp8 | None = None
    dtype: str = "BF16"
    files: Mapping[str, str | int] = field(default_factory=dict)
    changes: Mapping[str, Any] = field(default_factory=dict)
    layers: int = 2
    tiny: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The repository's name without its owner."""
        return self.repo.rpartition("/")[2]

    @property
    def experts(self) -> int:
        """Experts of each layer of the tiny checkpoint."""
        return EXPERTS

    def config(self, layers: int | None = None) -> Config:
        """The published ``config.json``, or that of a model of its first layers."""
        published = json.loads((CONFIGS / f"{self.name}.json").read_text("utf-8"))
        config = merged(published, self.changes)
        return config if layers is None or layers >= depth(config) else shallow(config, layers)

    def tiny_config(self) -> Config:
        """A ``config.json`` with the same keys and tiny values."""
        return tiny(self.config(), self.layers, self.tiny)

    def collect(self, config: Config) -> Tensors:
        """The tensors that belong to a config."""
        found = Tensors(dtype=self.dtype, fp8=self.fp8)
        self.tensors(found, config)
        return found

    def write_holes(self, folder: Path, layers: int | None = None) -> Path:
        """Writes the published checkpoint into an empty folder: true headers, and holes in place of the weights."""
        config = self.config(layers)
        _write_config(folder, config)
        shards = list(_split(self.collect(config).items, 5_000_000_000))
        places = {}
        for number, tensors in enumerate(shards, 1):
            file = _shard_name(number, len(shards))
            _write_shard_of_holes(folder / file, tensors)
            places |= dict.fromkeys(tensors, file)
        _write_index(folder, places, sum(spec.nbytes for tensors in shards for spec in tensors.values()))
        for file, content in self.files.items():
            path = folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, int):
                with path.open("wb") as hole:
                    hole.truncate(content)
            else:
                path.write_text(content)
        return folder

    def write_tiny(self, folder: Path) -> Path:
        """Writes a tiny checkpoint of random weights, under the published names, into an empty folder."""
        config = self.tiny_config()
        _write_config(folder, config)
        generator = torch.Generator().manual_seed(0)
        shards = list(_split(self.collect(config).items, 60_000))
        places, size = {}, 0
        for number, specs in enumerate(shards, 1):
            file = _shard_name(number, len(shards))
            tensors = {name: random_tensor(name, spec, generator) for name, spec in specs.items()}
            tensors |= _packed_shapes(specs)
            save_file(tensors, folder / file, metadata={"format": "pt"})
            size += sum(tensor.nbytes for tensor in tensors.values())
            places |= dict.fromkeys(tensors, file)
        _write_index(folder, places, size)
        return folder


def _packed_shapes(specs: Mapping[str, TensorSpec]) -> dict[str, Tensor]:
    """Shapes of the weights that are stored as packed integers: contents of the tensors that record them."""
    ending = ".weight_packed"
    shapes = {name.removesuffix(ending): spec.shape for name, spec in specs.items() if name.endswith(ending)}
    return {f"{name}.weight_shape": torch.tensor([rows, 8 * columns]) for name, (rows, columns) in shapes.items()}


def _write_config(folder: Path, config: Config) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.6}\n')


def _shard_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"


def _split(tensors: Mapping[str, TensorSpec], limit: int) -> Iterable[dict[str, TensorSpec]]:
    """Tensors by shard, each of at most ``limit`` bytes unless a single tensor is larger."""
    shard: dict[str, TensorSpec] = {}
    size = 0
    for name, spec in tensors.items():
        if shard and size + spec.nbytes > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = spec
        size += spec.nbytes
    yield shard


def _write_index(folder: Path, places: Mapping[str, str], size: int) -> None:
    if len(set(places.values())) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _write_shard_of_holes(path: Path, tensors: Mapping[str, TensorSpec]) -> None:
    """Writes the header of a safetensors file, and makes the file as long as its data would be."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, spec in tensors.items():
        header[name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [end, end + spec.nbytes]}
        end += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
