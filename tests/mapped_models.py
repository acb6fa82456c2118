"""Results of the mapped and the full layout, made from a tiny checkpoint without a conversion."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from hcsmoe_hub.checkpoint.source import LocalSource
from hcsmoe_hub.model.blocks import ExpertTensor
from hcsmoe_hub.model.model_class import model_class
from hcsmoe_hub.model.source_model import SourceModel, read_model
from hcsmoe_hub.planning.mapped_layout import CODE, mapped_config

Maps = Mapping[int, Sequence[int]]


def example_maps(model: SourceModel) -> dict[int, list[int]]:
    """Maps of several K: in turn half of the experts, two thirds of them, and a single one."""
    experts = model.settings.experts
    counts = (experts // 2, 2 * experts // 3, 1)
    return {
        block.layer: [(row * 5 + row // 2) % count if row >= count else row for row in range(experts)]
        for block, count in zip(model.blocks, counts * len(model.blocks), strict=False)
    }


def first_members(row_map: Sequence[int]) -> list[int]:
    """The lowest row that leads to each expert."""
    return [list(row_map).index(expert) for expert in range(max(row_map) + 1)]


def _choose(tensor: ExpertTensor, content: Tensor, rows: Sequence[int]) -> Tensor:
    experts, extra = tensor.split(content)
    return tensor.join(experts[list(rows)], extra)


def write_result(source: Path, folder: Path, maps: Maps, *, mapped: bool) -> Path:
    """Writes a result in which every expert of a cluster is its first member.

    Args:
        source: A tiny checkpoint.
        folder: Where to.
        maps: Expert of every router row, for each MoE layer.
        mapped: Whether to write K experts and the map; otherwise N experts, of which those of a cluster are copies.
    """
    model = read_model(LocalSource(source))
    parameters = model_class(model.skeleton.config).from_pretrained(source).state_dict()
    stored = {name: tensor for shard in source.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    for block in model.blocks:
        group, row_map = model.groups[block.layer], maps[block.layer]
        firsts = first_members(row_map)
        rows = firsts if mapped else [firsts[expert] for expert in row_map]
        chosen = {tensor.name: _choose(tensor, parameters[tensor.name], rows) for tensor in block.experts}
        for key in [key for key, target in group.targets.items() if target in chosen]:
            del stored[key]
        stored |= model.skeleton.to_stored(chosen, group)
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file({name: tensor.clone() for name, tensor in stored.items()}, folder / "model.safetensors", {"format": "pt"})
    if mapped:
        config = mapped_config(model.source.config, model, maps)
        (folder / "config.json").write_text(json.dumps(config))
        (folder / CODE.file).write_text(CODE.source(model))
    return folder
