"""Experts that are shared by router rows: N rows, K experts, and a map from one to the other in ``config.json``.

The router works as it did before the merge and names one of N experts; several of those names lead to the same
weights. ``hcsmoe`` in the config (of the text model, for composites) holds ``{"layout": "mapped", "expert_map":
{"<layer>": [expert of every router row]}}``; everything else in the config speaks of N experts. The layers of an
encoder-decoder model are numbered through both stacks, those of the encoder first.

This file travels with the checkpoint, which loads through ``AutoModelForCausalLM`` or ``AutoModelForSeq2SeqLM`` by
anyone who agrees to run it. It needs torch and transformers only. N router rows, K experts, T tokens, H hidden size, C
tokens of one expert.
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

SECTION, LAYOUT, CLASS_PREFIX = "hcsmoe", "mapped", "Mapped"
# Modules that hold each expert as a module of its own, and are called with one-hot masks instead of numbers.
ONE_BY_ONE = ("SwitchTransformersExperts", "NllbMoeExperts")


def read_expert_map(config: PreTrainedConfig) -> dict[int, tuple[int, ...]] | None:
    """Reads from a config which expert every router row of each MoE layer leads to.

    Returns:
        Layer to N numbers below that layer's K; ``None`` if the config is not of this layout.

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
            raise ValueError(f"the expert map of layer {layer} is not a list of experts numbered from 0 without a gap.")
    return {int(layer): tuple(experts) for layer, experts in layers.items()}


def expert_modules(model: nn.Module) -> dict[int, Any]:
    """Experts modules of a model by layer: those of transformers' experts interface, and the few others it has."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "has_gate") or type(module).__name__ in ("DbrxExperts", *ONE_BY_ONE):
            layer = _layer_number(model, name)
            if layer is None or layer in found:
                raise ValueError(f"the experts {name!r} cannot be distinguished by the number of their layer.")
            found[layer] = module
    return found


def _layer_number(model: nn.Module, name: str) -> int | None:
    """Number of the layer that holds a module; ``None`` if none does."""
    match = re.match(r"(.+?)\.(\d+)\.", name)
    if match is None:
        return None
    stack, number = match.group(1), int(match.group(2))
    if getattr(model.config, "is_encoder_decoder", False) and "decoder" in stack:
        encoder: Any = model.get_submodule(stack.replace("decoder", "encoder"))
        number += len(encoder)
    return number


def tie_experts(model: nn.Module, expert_map: Mapping[int, Sequence[int]]) -> None:
    """Lets the router rows of a model share experts: every MoE layer keeps its first K, and translates row to expert.

    Args:
        model: Built for N experts, on any device.
        expert_map: Layer to the expert of each of its N router rows.

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
        if _is_one_by_one(experts):
            experts.forward = partial(_run_masked, experts)
        else:
            experts.register_forward_pre_hook(_translate)
    for block in model.modules():
        if any(_is_one_by_one(part) for part in block.children()):
            # What transformers would fill with random numbers are N experts; each part is filled by itself.
            vars(block)["_is_hf_initialized"] = True


def _is_one_by_one(module: nn.Module) -> bool:
    return type(module).__name__ in ONE_BY_ONE


def _shrink(experts: Any, count: int) -> torch.device:
    """Keeps the first ``count`` experts, sets the attributes that count them, and returns the device of the weights.

    Parameters of the module itself are sized by experts; those of a part of it, a norm, are shared by all experts.
    """
    if _is_one_by_one(experts):
        for expert in range(count, experts.num_experts):
            del experts[f"expert_{expert}"]
        experts.num_experts = experts.num_tied_experts = count
        return next(experts.parameters()).device
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


def _run_masked(experts: Any, hidden_states: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
    """What experts that are modules of their own add to a batch of tokens.

    NLLB-MoE passes the weight of every router row, 0 where it was not chosen. Its mask shows the first choice only, and
    some versions of transformers mistake it for expert numbers, so it is not used.

    Args:
        experts: The module.
        hidden_states: Tokens ``[T, H]``.
        mask: Switch Transformers: one-hot row of every token ``[T, 1, N]``, all zero beyond its capacity.
        weights: Switch Transformers: ``[T, 1]``; NLLB-MoE: ``[T, N]``.

    Raises:
        ValueError: If the router passes something else, as another version of transformers might.
    """
    expert_of_row: Tensor = experts.expert_of_row
    weight_TN = (mask * weights[..., None]).sum(dim=1) if mask.dim() == 3 else weights
    if weight_TN.shape != (len(hidden_states), len(expert_of_row)):
        raise ValueError(
            f"the router weighs {list(weight_TN.shape)} choices, not {len(expert_of_row)} for each of "
            f"{len(hidden_states)} tokens: this version of transformers is not supported by the checkpoint."
        )
    count = experts.num_tied_experts
    weight_TK = weight_TN.new_zeros(len(weight_TN), count).index_add(1, expert_of_row, weight_TN)
    output_TH = torch.zeros_like(hidden_states)
    for expert in weight_TK.count_nonzero(dim=0).nonzero().flatten().tolist():
        token_C = weight_TK[:, expert].nonzero().flatten()
        found_CH = experts[f"expert_{expert}"](hidden_states[token_C]) * weight_TK[token_C, expert, None]
        output_TH.index_add_(0, token_C, _dropped(experts, found_CH).to(output_TH.dtype))
    return output_TH


def _dropped(experts: Any, output: Tensor) -> Tensor:
    """Output of an expert after NLLB-MoE's dropout; outside training it is multiplied by the share that is kept."""
    share = getattr(experts, "moe_token_dropout", 0)
    if not share:
        return output
    dropped: Tensor = experts.token_dropout(output) if experts.training else output * (1 - share)
    return dropped


class MappedExperts:
    """Put before the class of a language model: reads the map from its config and ties the experts."""

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
