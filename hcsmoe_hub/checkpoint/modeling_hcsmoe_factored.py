"""Experts whose matrices are two thin factors and a few whole rows, ``W = U V + S``, of sizes in ``config.json``.

``hcsmoe`` in the config (of the text model, for composites) holds ``{"layout": "factored", "rank": R,
"incoming_rows": C, "outgoing_rows": C}``: the rank of the factors, and the rows that S keeps of each matrix before and
behind the activation function. Every other number in the config means what it always means. Router and biases are
those of the class that is extended.

This file travels with the checkpoint, which loads through ``AutoModelForCausalLM`` or ``AutoModelForSeq2SeqLM`` by
anyone who agrees to run it. It needs torch and transformers only. K experts, M matrices before the activation function
(gate and up, or up alone), I neurons of an expert, H hidden size, R rank, C kept rows, T tokens, N tokens of an expert.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig

SECTION, LAYOUT, CLASS_PREFIX = "hcsmoe", "factored", "Factored"
INCOMING, OUTGOING = "incoming", "outgoing"
# Modules that hold each expert as a module of its own, and are called with one-hot masks instead of numbers: the linear
# layers of an expert, before and behind the activation function.
ONE_BY_ONE = {"SwitchTransformersExperts": ("wi", "wo"), "NllbMoeExperts": ("fc1", "fc2")}


@dataclass(frozen=True)
class FactorSizes:
    """Sizes that all experts of a model share.

    Attributes:
        rank: R.
        incoming_rows: C of the matrices before the activation function, of whose I rows each is one neuron.
        outgoing_rows: C of the matrix behind it, of whose H rows each is one number of the output.
    """

    rank: int
    incoming_rows: int
    outgoing_rows: int


def read_sizes(config: PreTrainedConfig) -> FactorSizes | None:
    """Reads the sizes of factors from a config.

    Returns:
        The sizes; ``None`` if the config is not of this layout.

    Raises:
        ValueError: If the entry is malformed.
    """
    section = getattr(config.get_text_config(), SECTION, None)
    if not isinstance(section, Mapping) or section.get("layout") != LAYOUT:
        return None
    lowest = {"rank": 1, "incoming_rows": 0, "outgoing_rows": 0}
    for name, least in lowest.items():
        size = section.get(name)
        if type(size) is not int or size < least:
            raise ValueError(f"{name} of the key {SECTION!r} of config.json is {size!r}, not a number from {least} on.")
    return FactorSizes(**{name: section[name] for name in lowest})


def experts_modules(model: nn.Module) -> dict[str, Any]:
    """Experts modules of a model by name: those of transformers' experts interface, and the few others it has."""
    kinds = {"DbrxExperts", *ONE_BY_ONE}
    modules = model.named_modules()
    return {name: module for name, module in modules if hasattr(module, "has_gate") or type(module).__name__ in kinds}


def factor_experts(model: nn.Module, sizes: FactorSizes) -> None:
    """Replaces the matrices of all experts of a model by factors and rows, with random values.

    Args:
        model: On any device.
        sizes: Of the factors.

    Raises:
        ValueError: If the experts have parameters of an unknown kind, or matrices smaller than the factors.
    """
    modules = experts_modules(model)
    if not modules:
        raise ValueError("the model has no experts whose matrices could be factors.")
    for name, experts in modules.items():
        if _is_one_by_one(experts):
            _factor_one_by_one(experts, sizes)
            continue
        holder, matrices = (experts.mlp, ("w1", "v1", "w2")) if _is_dbrx(experts) else (experts, _fused(experts))
        known = {*matrices, *(f"{matrix}_bias" for matrix in matrices)}
        strangers = [parameter for parameter, _ in holder.named_parameters(recurse=False) if parameter not in known]
        if strangers:
            raise ValueError(f"{strangers[0]} of the experts {name!r} is neither a matrix nor a bias.")
        count, neurons, hidden = _shape(experts)
        parts = 2 if _is_dbrx(experts) or experts.has_gate else 1
        like = getattr(holder, matrices[0])
        for matrix in matrices:
            delattr(holder, matrix)
        _add_factors(experts, INCOMING, (count, parts, neurons, hidden), sizes.rank, sizes.incoming_rows, like)
        _add_factors(experts, OUTGOING, (count, 1, hidden, neurons), sizes.rank, sizes.outgoing_rows, like)
        experts.forward = partial(_forward, experts)
        # What transformers would fill with random numbers is not there any more.
        experts._is_hf_initialized = holder._is_hf_initialized = True
    for block in model.modules():
        if any(_is_one_by_one(part) for part in block.children()):
            vars(block)["_is_hf_initialized"] = True


def _factor_one_by_one(experts: Any, sizes: FactorSizes) -> None:
    """Replaces the matrices of experts that are modules of their own; their biases stay where they are."""
    into, out = ONE_BY_ONE[type(experts).__name__]
    modules = [experts[f"expert_{expert}"] for expert in range(experts.num_experts)]
    like = getattr(modules[0], into).weight
    neurons, hidden = like.shape
    for expert in modules:
        for part in (expert, getattr(expert, into), getattr(expert, out)):
            part._is_hf_initialized = True
        del getattr(expert, into).weight, getattr(expert, out).weight
    _add_factors(experts, INCOMING, (len(modules), 1, neurons, hidden), sizes.rank, sizes.incoming_rows, like)
    _add_factors(experts, OUTGOING, (len(modules), 1, hidden, neurons), sizes.rank, sizes.outgoing_rows, like)
    experts.forward = partial(_forward_masked, experts)
    experts._is_hf_initialized = True


def _is_one_by_one(module: nn.Module) -> bool:
    return type(module).__name__ in ONE_BY_ONE


def _is_dbrx(module: nn.Module) -> bool:
    return type(module).__name__ == "DbrxExperts"


def _fused(experts: Any) -> tuple[str, str]:
    return ("gate_up_proj" if experts.has_gate else "up_proj"), "down_proj"


def _shape(experts: Any) -> tuple[int, int, int]:
    """K, I and H of an experts module."""
    if _is_dbrx(experts):
        return experts.num_experts, experts.ffn_hidden_size, experts.hidden_size
    shape = experts.down_proj.shape
    return (shape[0], shape[1], shape[2]) if experts.is_transposed else (shape[0], shape[2], shape[1])


def _add_factors(
    experts: Any, place: str, shape: tuple[int, int, int, int], rank: int, rows: int, like: Tensor
) -> None:
    """Adds U ``[K, M, O, R]``, V ``[K, M, R, I]``, rows of S ``[K, M, C, I]`` and their numbers ``[K, M, C]`` int32."""
    count, parts, outputs, inputs = shape
    if rank > min(outputs, inputs) or rows > outputs:
        raise ValueError(f"factors of rank {rank} and {rows} rows do not fit matrices of {outputs} x {inputs}.")
    sizes = {"u": (outputs, rank), "v": (rank, inputs), **({"s": (rows, inputs)} if rows else {})}
    for name, size in sizes.items():
        values = torch.empty(count, parts, *size, dtype=like.dtype, device=like.device).normal_(std=size[1] ** -0.5)
        experts.register_parameter(f"{place}_{name}", nn.Parameter(values, requires_grad=like.requires_grad))
    if rows:
        numbers = torch.arange(rows, dtype=torch.int32, device=like.device).repeat(count, parts, 1)
        experts.register_buffer(f"{place}_rows", numbers)


def _forward(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What the experts of a layer add up to, in the shape of ``hidden_states``."""
    tokens_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
    output_TH = torch.zeros_like(tokens_TH)
    # A number beyond the experts means "no expert".
    for expert in top_k_index.unique().tolist():
        if expert >= experts.num_experts:
            continue
        token_N, slot_N = torch.where(top_k_index == expert)
        found_NH = _run(experts, expert, tokens_TH[token_N]) * top_k_weights[token_N, slot_N, None]
        output_TH.index_add_(0, token_N, found_NH.to(output_TH.dtype))
    return output_TH.view_as(hidden_states)


def _forward_masked(experts: Any, hidden_states: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
    """What experts that are modules of their own add up to.

    NLLB-MoE passes the weight of every expert, 0 where it was not chosen. Its mask shows the first choice only, and
    some versions of transformers mistake it for expert numbers, so it is not used.

    Args:
        experts: The module.
        hidden_states: Tokens ``[T, H]``.
        mask: Switch Transformers: one-hot expert of every token ``[T, 1, K]``, all zero beyond its capacity.
        weights: Switch Transformers: ``[T, 1]``; NLLB-MoE: ``[T, K]``.

    Raises:
        ValueError: If the router passes something else, as another version of transformers might.
    """
    weight_TK = (mask * weights[..., None]).sum(dim=1) if mask.dim() == 3 else weights
    if weight_TK.shape != (len(hidden_states), experts.num_experts):
        raise ValueError(
            f"the router weighs {list(weight_TK.shape)} choices, not {experts.num_experts} for each of "
            f"{len(hidden_states)} tokens: this version of transformers is not supported by the checkpoint."
        )
    output_TH = torch.zeros_like(hidden_states)
    for expert in weight_TK.count_nonzero(dim=0).nonzero().flatten().tolist():
        token_N = weight_TK[:, expert].nonzero().flatten()
        found_NH = _run_one(experts, expert, hidden_states[token_N]) * weight_TK[token_N, expert, None]
        output_TH.index_add_(0, token_N, found_NH.to(output_TH.dtype))
    return output_TH


def _run_one(experts: Any, expert: int, tokens_NH: Tensor) -> Tensor:
    """The output of one expert that is a module of its own, after its dropout."""
    module = experts[f"expert_{expert}"]
    into, out = (getattr(module, name).bias for name in ONE_BY_ONE[type(experts).__name__])
    pre_NI = product(experts, INCOMING, expert, 0, tokens_NH)
    hidden_NI = module.dropout(module.act(pre_NI if into is None else pre_NI + into))
    output_NH = product(experts, OUTGOING, expert, 0, hidden_NI)
    output_NH = output_NH if out is None else output_NH + out
    share = getattr(experts, "moe_token_dropout", 0)
    if not share:
        return output_NH
    # Outside training, the output is multiplied by the share that dropout keeps.
    dropped: Tensor = experts.token_dropout(output_NH) if experts.training else output_NH * (1 - share)
    return dropped


def _run(experts: Any, expert: int, tokens_NH: Tensor) -> Tensor:
    """The output of one expert."""
    parts = experts.incoming_u.shape[1]
    incoming = [product(experts, INCOMING, expert, part, tokens_NH) for part in range(parts)]
    if _is_dbrx(experts):
        hidden_NI = experts.mlp.activation_fn(incoming[0]) * incoming[1]
        return product(experts, OUTGOING, expert, 0, hidden_NI)
    pre_NP = torch.cat(incoming, dim=-1) if experts.is_concatenated else torch.stack(incoming, dim=-1).flatten(-2)
    into, out = _fused(experts)
    if experts.has_bias:
        pre_NP = pre_NP + getattr(experts, f"{into}_bias")[expert]
    hidden_NI = experts._apply_gate(pre_NP) if experts.has_gate else experts.act_fn(pre_NP)
    output_NH = product(experts, OUTGOING, expert, 0, hidden_NI)
    if experts.has_bias:
        output_NH = output_NH + getattr(experts, f"{out}_bias")[expert]
    return experts.post_expert_norm(output_NH) if experts.has_post_expert_norm else output_NH


def product(experts: Any, place: str, expert: int, part: int, inputs_NI: Tensor) -> Tensor:
    """``(U V + S) x`` for every row x of some inputs, ``[N, O]``, without the whole matrix."""
    left_OR, right_RI = getattr(experts, f"{place}_u")[expert, part], getattr(experts, f"{place}_v")[expert, part]
    output_NO = functional.linear(functional.linear(inputs_NI, right_RI), left_OR)
    sparse = getattr(experts, f"{place}_s", None)
    if sparse is None:
        return output_NO
    kept_NC = functional.linear(inputs_NI, sparse[expert, part])
    return output_NO.index_add(1, getattr(experts, f"{place}_rows")[expert, part], kept_NC)


class FactoredExperts:
    """Put before the class of a language model: reads the sizes from its config and makes room for factors."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        wanted: Any = getattr(type(self), "config_class", None)
        # A multimodal checkpoint holds the config of its language model as one part of its own.
        own = config if wanted is None or isinstance(config, wanted) else config.get_text_config()
        parent: Any = super()
        parent.__init__(own, *args, **kwargs)
        sizes = read_sizes(own)
        if sizes is None:
            raise ValueError(f"config.json has no key {SECTION!r} of the layout {LAYOUT!r}.")
        model: Any = self
        factor_experts(model, sizes)

    @classmethod
    def is_custom_code(cls) -> bool:
        """Says no: names of stored tensors are converted as for the class of transformers that this one extends."""
        return False
