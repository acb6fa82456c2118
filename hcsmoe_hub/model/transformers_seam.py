"""What is used of transformers beyond its documented interface: the file to read when transformers is upgraded.

Private attributes, and modules that are not part of the public interface, are named nowhere else, but for
``checkpoint/modeling_hcsmoe.py``, which travels with checkpoints and stands alone.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import LoadStateDictConfig
from transformers.quantizers.auto import get_hf_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging as transformers_logging

# A step between a stored key and a parameter: a renaming, or a change of layout.
Conversion: TypeAlias = WeightTransform
Quantizer: TypeAlias = HfQuantizer


# Configs


def decode_special_floats(config: Mapping[str, Any]) -> dict[str, Any]:
    """A raw config with its infinite and undefined numbers, which the file only tags: JSON has no words for them."""
    return PreTrainedConfig._decode_special_floats(dict(config))


def make_dequantizer(
    config: PreTrainedConfig, settings: Any, dtype: torch.dtype
) -> tuple[HfQuantizer, PreTrainedConfig]:
    """What turns quantised weights into ``dtype`` while they are loaded, and the config that goes with it."""
    quantizer, config, _ = get_hf_quantizer(config, settings, {"": "cpu"}, True, {})
    quantizer.update_dtype(dtype)
    return quantizer, config


# Models without weights


def build_without_weights(
    model_type: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype, quantizer: HfQuantizer | None
) -> PreTrainedModel:
    """A model on the meta device, but for the buffers that no checkpoint stores (rotary frequencies)."""
    with ExitStack() as contexts:
        for context in model_type.get_init_context(dtype, quantizer is not None, False, None):
            contexts.enter_context(context)
        model = model_type(config)
        if quantizer is not None:
            quantizer.preprocess_model(
                model=model, dtype=dtype, device_map={"": "cpu"}, checkpoint_files=None, use_kernels=False
            )
    model.eval().requires_grad_(False)
    nothing: Any = set()
    # First off the meta device, then computed.
    model._move_missing_keys_from_meta_to_device(nothing, {"": "cpu"}, None, None)
    model._initialize_missing_keys(quantizer is not None)
    return model


def unsplit_classes(model: PreTrainedModel) -> set[str]:
    """Names of the module classes that transformers keeps on one device: its decoder layers, among others."""
    return set(model._no_split_modules or ())


# Stored keys and parameters


def conversions_for_loading(model: PreTrainedModel, quantizer: HfQuantizer | None) -> list[Conversion]:
    """A fresh copy of transformers' conversions for loading a model."""
    return get_model_conversion_mapping(model, None, quantizer)


def conversions_for_saving(model: PreTrainedModel, *, is_quantized: bool) -> list[Conversion]:
    """A fresh copy of the conversions that saving undoes: those for loading, but for any that dequantise."""
    return get_model_conversion_mapping(model, None, None, add_legacy=not is_quantized)


def parameter_of(key: str, conversions: list[Conversion], prefix: str, state: dict[str, Tensor]) -> tuple[str, bool]:
    """Name of the parameter that a stored key becomes or is a part of, and whether it is only renamed.

    Args:
        key: The stored key.
        conversions: Those of its model; each remembers that it matched.
        prefix: The model's ``base_model_prefix``.
        state: The model's parameters by name.
    """
    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
    name, pattern = rename_source_key(key, renamings, converters, prefix, state)
    if name not in state and key in state:
        name, pattern = rename_source_key(key, [], [], prefix, state)
    return name, pattern is None


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
    quantizer: HfQuantizer | None,
) -> list[str]:
    """Loads stored tensors into a model as ``from_pretrained`` does.

    Args:
        model: Where they go.
        lazy: Tensors by stored key, or objects that are sliced like those of safetensors.
        dtype: Of the weights in memory.
        device: Where they go.
        quantizer: Turns quantised weights back.

    Returns:
        What transformers could not place, in its words; empty if nothing.
    """
    settings = LoadStateDictConfig(
        device_map={"": device},
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        weight_mapping=list[Any](conversions_for_loading(model, quantizer)),
        hf_quantizer=quantizer,
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


def register_experts(name: str, function: Callable[..., Tensor]) -> None:
    """Adds a function to those that fused experts can compute through.

    Args:
        name: What it is called from now on.
        function: Called with the module, tokens ``[T, H]``, and the router's choices and weights, ``[T, K]`` each.
    """
    ALL_EXPERTS_FUNCTIONS.register(name, function)


def switch_experts(model: PreTrainedModel, name: str) -> None:
    """Lets a model's fused experts compute through a registered function, if it has any."""
    if model._can_set_experts_implementation():
        model.set_experts_implementation(name)
