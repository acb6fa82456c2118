"""The mapped layout: N router rows, K experts, a map in ``config.json`` and a modelling file that reads it.

This is what HC-SMoE (arXiv 2410.08589) and M-SMoE (arXiv 2310.01334) describe: the router keeps its rows, and those of
the members of a cluster lead to one expert.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from hcsmoe_hub.checkpoint.modeling_hcsmoe import LAYOUT, SECTION, expert_modules
from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.model.source_model import SourceModel
from hcsmoe_hub.options import Layout
from hcsmoe_hub.planning.own_code import OWN_CODE

CODE = OWN_CODE[Layout.MAPPED]


def mapped_refusal(model: SourceModel) -> str | None:
    """Why a model cannot have the mapped layout; ``None`` if it can."""
    try:
        modules = expert_modules(model.skeleton.module)
    except ValueError as error:
        return f"the modelling file of this layout does not work for it: {str(error).rstrip('.')}"
    if missing := sorted({block.layer for block in model.blocks} - modules.keys()):
        kind = type(model.skeleton.module.get_submodule(model.blocks[0].experts_path)).__name__
        return (
            f"{kind} of layer {missing[0]} runs every expert on inputs that the router has scaled, so no two router "
            "rows can lead to one expert"
        )
    return None


def mapped_config(
    raw_config: Mapping[str, Any], model: SourceModel, maps: Mapping[int, Sequence[int]]
) -> dict[str, Any]:
    """Returns a copy of a raw config that describes the mapped layout.

    ``hcsmoe`` goes where the expert count is: into ``text_config`` if there is one. ``auto_map`` of the source is
    replaced as a whole: agreeing to run our file must not run others with it.

    Args:
        raw_config: Config of the source, N experts.
        model: The source.
        maps: For every MoE layer the number of the expert that each of the N router rows leads to.

    Raises:
        PlanError: If the model cannot have this layout, or a map is not one of its router rows.
    """
    if reason := mapped_refusal(model):
        raise PlanError(f"{model.source.label} cannot have the mapped layout: {reason}.", hint="use `layout='full'`")
    layers, rows = {block.layer for block in model.blocks}, model.settings.experts
    for layer in sorted(layers | maps.keys()):
        row_map = list(maps.get(layer, ()))
        if layer not in layers or len(row_map) != rows or set(row_map) != set(range(len(set(row_map)))):
            raise PlanError(
                f"the map {row_map} of layer {layer} does not lead from each of {rows} router rows to an expert "
                "numbered from 0 without a gap.",
                hint="give one map for every MoE layer",
            )
    config = copy.deepcopy(dict(raw_config))
    config["architectures"] = [CODE.class_name(model)]
    config["auto_map"] = CODE.auto_map(model)
    text_config = config.get("text_config")
    section = text_config if isinstance(text_config, dict) else config
    section[SECTION] = {
        "layout": LAYOUT,
        "expert_map": {str(layer): [int(expert) for expert in maps[layer]] for layer in sorted(maps)},
    }
    return config
