"""Experts that are shared by router rows: N rows, K experts, and a map from one to the other in ``config.json``.

The router works as it did before the merge and names one of N experts; several of those names lead to the same
weights. ``hcsmoe`` in the config (of the text model, for composites) holds ``{"layout": "mapped", "expert_map":
{"<decoder layer>": [expert of every router row]}}``; everything else in the config speaks of N experts.

This file travels with the checkpoint, which loads through ``AutoModelForCausalLM`` by anyone who agrees to run it. It
needs torch and transformers only. N router rows, K experts, T tokens, H hidden size.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

SECTION, LAYOUT, CLASS_PREFIX = "hcsmoe", "mapped", "Mapped"


def read_expert_map(config: PreTrainedConfig) -> dict[int, tuple[int, ...]] | None:
    """Reads from a config which expert every router row of each MoE layer leads to.

    Returns:
        Decoder layer to N numbers below that layer's K; ``None`` if the config is not of this layout.

    Raises:
        ValueError: If the entry is malformed.
    """
    section = getattr(config.get_text_config(), SECTION, None)
    if section is None:
        return None
    layers = section.get("expert_map") if isinstance(section, Mapping) else None
    if not isinstance(layers, Mapping) or section.get("layout") != LAYOUT:
        raise ValueError(f"the key {SECTION!r} of config.json does not describe the layout {LAYOUT!r}.")
    for layer, experts in layers.items():
        is_list = isinstance(experts, list) and all(type(expert) is int for expert in experts)
        if not re.fullmatch("[0-9]+", str(layer)) or not is_list or set(experts) != set(range(len(set(experts)))):
            raise ValueError(f"the expert map of layer {layer} is no list of experts numbered from 0 without a gap.")
    return {int(layer): tuple(experts) for layer, experts in layers.items()}


def expert_modules(model: nn.Module) -> dict[int, Any]:
    """Experts modules of a model by decoder layer: those of transformers' experts interface, and DBRX's."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "_apply_gate") or type(module).__name__ == "DbrxExperts":
            match = re.search(r"\.(\d+)\.", name)
            if match is None or int(match.group(1)) in found:
                raise ValueError(f"the experts {name!r} cannot be told apart by the number of their decoder layer.")
            found[int(match.group(1))] = module
    return found


def tie_experts(model: nn.Module, expert_map: Mapping[int, Sequence[int]]) -> None:
    """Lets the router rows of a model share experts: every MoE layer keeps its first K, and translates row to expert.

    Args:
        model: Built for N experts, on any device.
        expert_map: Decoder layer to the expert of each of its N router rows.

    Raises:
        ValueError: If the map is not one for this model.
    """
    modules = expert_modules(model)
    if modules.keys() != expert_map.keys():
        raise ValueError(f"config.json maps the experts of layers {sorted(expert_map)}, not of {sorted(modules)}.")
    for layer, experts in modules.items():
        row_map = expert_map[layer]
        if len(row_map) != experts.num_experts:
            raise ValueError(
                f"config.json maps {len(row_map)} router rows of layer {layer}, which has {experts.num_experts}."
            )
        device = _shrink(experts, max(row_map) + 1)
        # The numbers are real even where the weights have no storage yet.
        device = torch.device("cpu") if device.type == "meta" else device
        experts.register_buffer("expert_of_row", torch.tensor(row_map, device=device), persistent=False)
        experts.register_forward_pre_hook(_translate)


def _shrink(experts: Any, count: int) -> torch.device:
    """Keeps the first ``count`` experts of every tensor, sets the attributes that count them, and says where they lie.

    Parameters of the module itself are sized by experts; those of a part of it, a norm, are shared by all experts.
    """
    holder = experts.mlp if type(experts).__name__ == "DbrxExperts" else experts
    parameters = dict(holder.named_parameters(recurse=False))
    for name, parameter in parameters.items():
        rows = parameter.shape[0] // experts.num_experts * count
        kept = nn.Parameter(parameter.detach()[:rows].clone(), requires_grad=parameter.requires_grad)
        setattr(holder, name, kept)
    if holder is not experts:
        holder.moe_num_experts = count
    # Kept apart, because expert parallelism sets the other one to the count of its own device.
    experts.num_experts = experts.num_tied_experts = count
    return next(iter(parameters.values())).device


def _translate(experts: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Turns router rows into experts; a row beyond N, which means "no expert", means the same beyond K."""
    tokens_TH, row_TK, *others = inputs
    expert_of_row: Tensor = experts.expert_of_row
    rows = len(expert_of_row)
    expert_TK = expert_of_row[row_TK.clamp(max=rows - 1)].to(row_TK.dtype)
    return tokens_TH, torch.where(row_TK < rows, expert_TK, row_TK - rows + experts.num_tied_experts), *others


class MappedExperts:
    """Put before the class of a causal language model: reads the map from its config and ties the experts."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        wanted: Any = getattr(type(self), "config_class", None)
        # A multimodal checkpoint holds the config of its language model as one part of its own.
        own = config if wanted is None or isinstance(config, wanted) else config.get_text_config()
        parent: Any = super()
        parent.__init__(own, *args, **kwargs)
        expert_map = read_expert_map(own)
        if expert_map is None:
            raise ValueError(f"config.json has no key {SECTION!r}, so it is unknown which router rows share experts.")
        model: Any = self
        tie_experts(model, expert_map)
        self._expert_map = expert_map

    @classmethod
    def is_custom_code(cls) -> bool:
        """Says no: names of stored tensors are converted as for the class of transformers that this one extends."""
        return False

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Also fills in the maps, which are not stored and lose their values when a model is moved off ``meta``."""
        parent: Any = super()
        parent.initialize_weights()
        model: Any = self
        modules = expert_modules(model)
        # Empty while the model is being built, when the experts are not tied yet.
        for layer, row_map in getattr(self, "_expert_map", {}).items():
            modules[layer].expert_of_row.copy_(torch.tensor(row_map, device="cpu"))
