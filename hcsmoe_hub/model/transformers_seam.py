"""What is used of transformers beyond its documented interface: the file to read when transformers is upgraded.

Private attributes, and modules that are not part of the public interface, are named nowhere else, but for
``checkpoint/modeling_hcsmoe.py``, which travels with checkpoints and stands alone.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Transpose,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

# A step between a stored key and a parameter: a renaming, or a change of layout.
Conversion: TypeAlias = WeightTransform


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
    """A fresh copy of transformers' conversions between stored names and the parameters of a model."""
    return get_model_conversion_mapping(model)


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


def _converter_of(name: str, conversions: list[Conversion]) -> tuple[WeightConverter | None, str | None]:
    """The conversion that changes a stored tensor's layout, and the part of its name that it replaces, if any does."""
    renamings, converters = _by_kind(conversions)
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    for converter in converters:
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
) -> list[str]:
    """Loads stored tensors into a model as ``from_pretrained`` does.

    Args:
        model: Where they go.
        lazy: Tensors by stored key, or objects that are sliced like those of safetensors.
        dtype: Of the weights in memory.
        device: Where they go.

    Returns:
        What transformers could not place, in its words; empty if nothing.
    """
    settings = LoadStateDictConfig(
        device_map={"": device},
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        weight_mapping=list[Any](model_conversions(model)),
    )
    info, _ = convert_and_load_state_dict_in_model(model, lazy, settings, None)
    return [*info.conversion_errors.values(), *info.unexpected_keys, *map(str, info.mismatched_keys)]


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
