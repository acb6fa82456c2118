"""What is used of transformers beyond its documented interface: the file to read when transformers is upgraded.

Private attributes, and modules that are not part of the public interface, are named nowhere else, but for
``checkpoint/modeling_hcsmoe.py``, which travels with checkpoints and stands alone.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import NllbMoeConfig, PreTrainedConfig, PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate
from transformers.masking_utils import sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import LoadStateDictConfig
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeSparseMLP
from transformers.utils import logging as transformers_logging

from hcsmoe_hub.machine.accelerator import HOST

# A step between a stored key and a parameter: a renaming, or a change of layout.
Conversion: TypeAlias = WeightTransform
# Keys of a config for what computes the attention and the experts of its model.
ATTENTION_KEY, EXPERTS_KEY = "_attn_implementation", "_experts_implementation"


# Configs


def decode_special_floats(config: Mapping[str, Any]) -> dict[str, Any]:
    """A raw config with its infinite and undefined numbers, which the file only tags: JSON has no words for them."""
    return PreTrainedConfig._decode_special_floats(dict(config))


# Models without weights


def build_without_weights(
    model_type: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype
) -> PreTrainedModel:
    """A model on the meta device, but for the buffers that no checkpoint stores (rotary frequencies)."""
    with ExitStack() as contexts:
        for context in model_type.get_init_context(dtype, False, False, None):
            contexts.enter_context(context)
        model = model_type(config)
    model.eval().requires_grad_(False)
    nothing: Any = set()
    # First off the meta device, then computed.
    model._move_missing_keys_from_meta_to_device(nothing, {"": "cpu"}, None, None)
    stored: dict[str, Any] = model.state_dict(keep_vars=True)
    for tensor in stored.values():
        # As after loading: to draw random numbers without storing them takes longer than to build the model.
        tensor._is_hf_initialized = True
    model._initialize_missing_keys(False)
    return model


def unsplit_classes(model: PreTrainedModel) -> set[str]:
    """Names of the module classes that transformers keeps on one device: its decoder layers, among others."""
    return set(model._no_split_modules or ())


def class_in_folder(reference: str, folder: Path) -> Any:
    """The class that a modelling file in a folder defines; its code runs.

    Args:
        reference: File and class as ``auto_map`` names them, ``modeling_hcsmoe.MappedMixtralForCausalLM`` say.
        folder: The folder.
    """
    return get_class_from_dynamic_module(reference, str(folder))


# Stored keys and parameters


def model_conversions(model: PreTrainedModel) -> list[Conversion]:
    """A fresh copy of the conversions between stored names and the parameters of a model.

    They are those of transformers, and those of modules of our own, whose classes have ``own_conversions``.
    """
    kinds: dict[Any, None] = dict.fromkeys(type(each) for each in model.modules() if hasattr(each, "own_conversions"))
    return [*get_model_conversion_mapping(model), *(each for kind in kinds for each in kind.own_conversions())]


def stacking(source: str, target: str) -> Conversion:
    """A conversion that stacks the tensors of experts along a first dimension.

    Args:
        source: What the stored names have in common, with an asterisk for the number of the expert.
        target: What that part becomes.
    """
    return WeightConverter(source_patterns=source, target_patterns=target, operations=[MergeModulelist(dim=0)])


def parameter_of(
    name: str, conversions: list[Conversion], prefix: str, state: dict[str, Tensor]
) -> tuple[str, str | None]:
    """Finds the parameter that a stored name becomes or is a part of.

    Args:
        name: The stored name.
        conversions: Those of its model; each remembers that it matched.
        prefix: The model's ``base_model_prefix``.
        state: The model's parameters by name.

    Returns:
        Name of the parameter, and the part of the stored name that a conversion replaces; ``None`` if it is only
        renamed.
    """
    renamings, converters = _by_kind(conversions)
    found, pattern = rename_source_key(name, renamings, converters, prefix, state)
    if found not in state and name in state:
        found, pattern = rename_source_key(name, [], [], prefix, state)
    return found, None if pattern is None else converted_part(name, conversions)


def converted_part(name: str, conversions: list[Conversion]) -> str | None:
    """The part of a stored name that a conversion other than a renaming replaces, ``experts.3.w1.weight`` say."""
    return _converter_of(name, conversions)[1]


def further_parameters(name: str, parameter: str, conversions: list[Conversion]) -> list[str]:
    """The other parameters that a conversion makes of one stored tensor, such as the halves of a joint projection.

    Args:
        name: The stored name.
        parameter: The first parameter that it becomes.
        conversions: Those of its model.
    """
    found, _ = _converter_of(name, conversions)
    first, *others = [""] if found is None else found.target_patterns
    before, _, after = parameter.rpartition(first)
    return [before + other + after for other in others]


def optional_transposition(name: str, conversions: list[Conversion]) -> tuple[int, int] | None:
    """Dimensions that a conversion swaps only if the stored shape is not yet the model's; ``None`` if it is another.

    Such a conversion cannot be undone from the shape of the parameter alone.
    """
    found, _ = _converter_of(name, conversions)
    match [] if found is None else found.operations:
        case [Transpose(check_dims=True, dim0=first, dim1=second)]:
            return first, second
        case _:
            return None


def stacked_part(name: str, conversions: list[Conversion]) -> int | None:
    """Which part of every expert a stored tensor is, if its parameter only stacks such parts ``[E, parts, ...]``.

    Args:
        name: The stored name of a tensor of one expert.
        conversions: Those of its model.

    Returns:
        Number of the part, 0 for the gate and 1 for the up projection say; ``None`` if the conversion does anything
        else than stack experts along the first dimension and join their parts along the second.
    """
    found, _ = _converter_of(name, conversions)
    if found is None or found.force_cpu or len(found.target_patterns) > 1:
        return None
    match found.operations:
        case [MergeModulelist(dim=0)] if len(found.source_patterns) == 1:
            return 0
        case [MergeModulelist(dim=0), Concatenate(dim=1)]:
            return found.source_patterns.index(found.rename_source_key(_renamed(name, conversions))[1] or "")
        case _:
            return None


def order_of_experts(names: Iterable[str]) -> list[str]:
    """Stored names in the order in which transformers stacks their tensors: numbers count as numbers."""
    return sorted(names, key=dot_natural_key)


def _renamed(name: str, conversions: list[Conversion]) -> str:
    """A stored name as the conversions other than renamings see it."""
    for renaming in _by_kind(conversions)[0]:
        name, _ = renaming.rename_source_key(name)
    return name


def _converter_of(name: str, conversions: list[Conversion]) -> tuple[WeightConverter | None, str | None]:
    """The conversion that changes a stored tensor's layout, and the part of its name that it replaces, if any does."""
    name = _renamed(name, conversions)
    for converter in _by_kind(conversions)[1]:
        match = converter._scoped_match(name)
        if match is not None:
            return converter, match[2].group(0)
    return None, None


def _by_kind(conversions: list[Conversion]) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    return (
        [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)],
        [conversion for conversion in conversions if isinstance(conversion, WeightConverter)],
    )


def to_stored(
    model: PreTrainedModel, tensors: Mapping[str, Tensor], conversions: list[Conversion]
) -> dict[str, Tensor]:
    """Parameters by name to tensors under the names of a checkpoint; on the meta device as well."""
    # The attribute that transformers itself sets while loading.
    vars(model)["_weight_conversions"] = conversions
    return revert_weight_conversion(model, dict(tensors))


def load_weights(
    model: PreTrainedModel,
    lazy: dict[str, Any],
    dtype: torch.dtype,
    *,
    device: torch.device,
    on_host: Set[str] = frozenset(),
) -> list[str]:
    """Loads stored tensors into a model as ``from_pretrained`` does.

    A parameter on the meta device that has another dtype keeps that.

    Args:
        model: Where they go.
        lazy: Tensors by stored key, or objects that are sliced like those of safetensors.
        dtype: Of the weights in memory.
        device: Where they go.
        on_host: Parameters that stay on the host.

    Returns:
        What transformers could not place, in its words; empty if nothing.
    """
    settings = LoadStateDictConfig(
        device_map={"": device} | dict.fromkeys(on_host, HOST),
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        weight_mapping=list[Any](model_conversions(model)),
    )
    info, _ = convert_and_load_state_dict_in_model(model, lazy, settings, None)
    return [*info.conversion_errors.values(), *info.unexpected_keys, *map(str, info.mismatched_keys)]


def has_dtype_of_its_own(model: PreTrainedModel, parameter: str, dtype: torch.dtype) -> bool:
    """Whether transformers loads a parameter in another dtype than the rest of its model."""
    # What follows a wildcard is not looked at: a parameter too many does no harm here.
    return any(pattern.partition("*")[0] in parameter for pattern in model._get_dtype_plan(dtype))


@contextmanager
def sequential_loading() -> Iterator[None]:
    """Lets transformers read tensors one by one instead of a whole layer ahead, which halves the transient memory."""
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name)
    bars = transformers_logging.is_progress_bar_enabled()
    os.environ[name] = "1"
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
        if bars:
            transformers_logging.enable_progress_bar()


# Experts


def is_fused_experts(module: nn.Module) -> bool:
    """Whether a module is one of transformers' fused experts, which compute through a function of one's choice."""
    return hasattr(module, "_apply_gate")


def apply_gate(module: Any, pre_TP: Tensor) -> Tensor:
    """Hidden activation of fused experts from the pre-activations of gate and up projection."""
    return module._apply_gate(pre_TP)


def has_plain_gate(module: Any) -> bool:
    """Whether the gate of fused experts is transformers' own: activation of the first half, times the second half."""
    return type(module)._apply_gate is _default_apply_gate and bool(module.is_concatenated)


def is_silu(activation: Any) -> bool:
    """Whether an activation function of transformers is SiLU."""
    return isinstance(activation, nn.SiLU | SiLUActivation) or activation is nn.functional.silu


def register_experts(name: str, function: Callable[..., Tensor]) -> None:
    """Adds a function to those that fused experts can compute through.

    Args:
        name: What it is called from now on.
        function: Called with the module, tokens ``[T, H]``, and the router's choices and weights, ``[T, K]`` each.
    """
    ALL_EXPERTS_FUNCTIONS.register(name, function)


def switch_experts(model: PreTrainedModel, name: str) -> None:
    """Lets the fused experts of a model, and of the models inside it, compute through a registered function."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and part._can_set_experts_implementation():
            part.set_experts_implementation(name)


def implementations(model: PreTrainedModel) -> dict[str, str]:
    """What computes the attention and the experts of a model: ``sdpa`` and ``grouped_mm``, say."""
    names = {"attention": ATTENTION_KEY, "experts": EXPERTS_KEY}
    return {part: str(getattr(model.config.get_text_config(), name, None) or "eager") for part, name in names.items()}


def attention_mask(**asked: Any) -> Tensor | None:
    """A mask ``[B, 1, Q, S]`` of the pairs of query and key that count, also where it could be left out.

    Args:
        **asked: What transformers asks a function for masks for.
    """
    skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask: Tensor | None = sdpa_mask(**{**asked, **skips})
    return mask


def is_computed_twice(part: nn.Module) -> bool:
    """Whether a part of a model is a layer that keeps nothing for its gradients, and computes again instead."""
    return isinstance(part, GradientCheckpointingLayer) and bool(part.gradient_checkpointing)


def nllb_block(config: NllbMoeConfig, width: int) -> Any:
    """An MoE block of NLLB-MoE as transformers builds it, with random weights.

    Args:
        config: Of the model.
        width: Neurons of each expert.
    """
    return NllbMoeSparseMLP(config, ffn_dim=width)
