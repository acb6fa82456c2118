"""A transformers model without weights, and transformers' own map between its parameters and the stored keys."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

from hcsmoe_hub.checkpoint.modeling_hcsmoe import CLASS_PREFIX, MappedExperts, read_expert_map
from hcsmoe_hub.errors import UnsupportedModelError
from hcsmoe_hub.model.transformers_seam import (
    Conversion,
    Quantizer,
    build_without_weights,
    conversions_for_loading,
    conversions_for_saving,
    decode_special_floats,
    make_dequantizer,
    parameter_of,
    to_stored,
    unsplit_classes,
)

# Formats that transformers turns back into bf16 exactly while it loads; every other one is refused.
DEQUANTIZERS: Mapping[str, type] = {"fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config}


def quantization_method(config: Mapping[str, Any]) -> str | None:
    """Name of the quantisation of a raw config, or ``None``."""
    text_config = config.get("text_config")
    nested = text_config.get("quantization_config") if isinstance(text_config, dict) else None
    settings = config.get("quantization_config") or nested
    if not settings:
        return None
    return str(settings.get("quant_method", "an unnamed format")) if isinstance(settings, dict) else str(settings)


def build_config(config: Mapping[str, Any]) -> PreTrainedConfig:
    """Builds the config object that ``AutoModelForCausalLM`` would build from a raw config.

    Raises:
        UnsupportedModelError: If transformers does not know the model, or it is not a causal language model.
    """
    model_type = str(config.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"model_type {model_type!r} is not part of transformers {transformers.__version__}; "
            "hcsmoe runs no code from a repository.",
            hint="see 'hcsmoe architectures' for what is supported, or upgrade transformers",
        )
    built = CONFIG_MAPPING[model_type].from_dict(decode_special_floats(config))
    if _native_class(built) is None and _named_class(built) is None:
        raise UnsupportedModelError(
            f"model_type {model_type!r} cannot be loaded by AutoModelForCausalLM.",
            hint="see 'hcsmoe architectures' for what is supported",
        )
    if model_class(built).config_class is built.sub_configs.get("text_config"):
        return built.get_text_config()
    return built


def _native_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class of transformers itself that its auto class maps; other code may have added classes to that map."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    mapped: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    found: type[PreTrainedModel] = mapped[0] if isinstance(mapped, tuple) else mapped
    return found if found.__module__.startswith("transformers.") else None


def _named_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The causal language model that ``architectures`` names, for models that no auto class maps."""
    for architecture in config.architectures or ():
        name = architecture.removeprefix(CLASS_PREFIX)
        if name.endswith("ForCausalLM") and hasattr(transformers, name):
            found: type[PreTrainedModel] = getattr(transformers, name)
            return found
    return None


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The model class of transformers that ``AutoModelForCausalLM`` would choose, or that a mapped result extends."""
    found = _native_class(config) or _named_class(config)
    assert found is not None, "build_config refuses a config without a causal language model"
    return found


@dataclass
class Group:
    """Stored keys that belong together: one decoder layer, or everything outside the layers.

    Attributes:
        targets: Stored key to the name of the parameter that it becomes, or is a part of.
        renamed: Stored keys that are only renamed, never converted.
        dequantized: Parameters that are computed from quantised keys.
        conversions: What to undo when parameters of this group are written.
    """

    targets: dict[str, str] = field(default_factory=dict)
    renamed: set[str] = field(default_factory=set)
    dequantized: set[str] = field(default_factory=set)
    conversions: list[Conversion] = field(default_factory=list)


class Skeleton:
    """A model on the meta device: shapes, names and a working forward pass, but no weights.

    Args:
        config: Raw ``config.json``.
        dtype: Dtype of the weights once they are loaded.

    Attributes:
        expert_map: Decoder layer to the expert of each router row, for a result in the mapped layout.
    """

    def __init__(self, config: Mapping[str, Any], dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.config = build_config(config)
        self.config.dtype = dtype
        # Collected over the whole calibration set, the logits of every router would outweigh the layers.
        self.config.output_router_logits = False
        self.quantizer = self._quantizer(quantization_method(config))
        self.expert_map = read_expert_map(self.config)
        model_type = model_class(self.config)
        if self.expert_map is not None:
            model_type = type(CLASS_PREFIX + model_type.__name__, (MappedExperts, model_type), {})
        self.module: PreTrainedModel = build_without_weights(model_type, self.config, dtype, self.quantizer)
        self.layers_name, self.layers = self._decoder_layers()

    def _quantizer(self, method: str | None) -> Quantizer | None:
        if method is None:
            return None
        if method not in DEQUANTIZERS:
            raise UnsupportedModelError(
                f"the weights are quantised with {method}; merging needs the numbers behind them, and only "
                f"{' and '.join(DEQUANTIZERS)} can be turned back exactly.",
                hint="convert the unquantised checkpoint of the same model",
            )
        settings = DEQUANTIZERS[method](dequantize=True)
        quantizer, self.config = make_dequantizer(self.config, settings, self.dtype)
        return quantizer

    def _decoder_layers(self) -> tuple[str, nn.ModuleList]:
        """The longest list of the modules that transformers never splits: the decoder layers."""
        class_names = unsplit_classes(self.module)
        found = [
            (name, module)
            for name, module in self.module.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) and type(module[0]).__name__ in class_names
        ]
        if not found:
            raise UnsupportedModelError(
                f"{type(self.module).__name__} has no list of decoder layers, so it cannot be streamed layer by layer.",
                hint="see 'hcsmoe architectures' for what is supported",
            )
        return max(found, key=lambda item: len(item[1]))

    @cached_property
    def state(self) -> dict[str, Tensor]:
        """Every parameter and persistent buffer, on the meta device; taken before anything is loaded."""
        return dict(self.module.state_dict())

    def layer_of(self, parameter: str) -> int | None:
        """Index of the decoder layer that holds a parameter, ``None`` outside the layers."""
        match = re.match(rf"{re.escape(self.layers_name)}\.(\d+)\.", parameter)
        return int(match.group(1)) if match else None

    def _parameter_of(self, key: str, conversions: list[Conversion]) -> tuple[str, bool]:
        """Parameter that a stored key becomes, and whether it is only renamed."""
        return parameter_of(key, conversions, self.module.base_model_prefix, self.state)

    def group_keys(self, keys: Iterable[str]) -> tuple[dict[int | None, Group], list[str]]:
        """Sorts stored keys by decoder layer, as transformers' loader would place them.

        Returns:
            The groups (``None`` is everything outside the layers), and the keys that this model does not use.
        """
        groups: dict[int | None, Group] = defaultdict(Group)
        unused = []
        conversions = conversions_for_loading(self.module, self.quantizer)
        for key in keys:
            target, is_renamed = self._parameter_of(key, conversions)
            if target not in self.state:
                unused.append(key)
                continue
            group = groups[self.layer_of(target)]
            group.targets[key] = target
            if is_renamed:
                group.renamed.add(key)
        for group in groups.values():
            self._find_conversions(group)
        return dict(groups), unused

    def _find_conversions(self, group: Group) -> None:
        """Finds what to undo when this group is written: the conversions that matched, except those that dequantise.

        They are gathered per group because a renaming that fits one layer (a sparse one, say) may hit keys of
        another that never had it. A key that only the quantiser understands marks its parameter as dequantised.
        """
        plain = conversions_for_saving(self.module, is_quantized=self.quantizer is not None)
        for key, parameter in group.targets.items():
            target, _ = self._parameter_of(key, plain)
            if target not in self.state:
                group.dequantized.add(parameter)
        group.conversions = [conversion for conversion in plain if conversion.was_used()]

    def to_stored(self, tensors: Mapping[str, Tensor], conversions: list[Conversion]) -> dict[str, Tensor]:
        """Parameters under their in-memory names to tensors under the source's stored names.

        Works on the meta device as well, which is how the plan learns the names of the result.
        """
        return to_stored(self.module, tensors, conversions)
