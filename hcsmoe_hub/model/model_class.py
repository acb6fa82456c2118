"""Which class of transformers a checkpoint is, and the config object that goes with it."""

import copy
from collections.abc import Mapping
from typing import Any

import transformers
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)

from hcsmoe_hub.checkpoint import modeling_hcsmoe, modeling_hcsmoe_factored
from hcsmoe_hub.checkpoint.config_json import SECTIONS
from hcsmoe_hub.errors import UnsupportedModelError
from hcsmoe_hub.model.raw_config import SAME_CODE, buildable, without_foreign_padding
from hcsmoe_hub.model.transformers_seam import decode_special_floats

# What the names of classes in modelling files of results begin with.
_OWN_PREFIXES = (modeling_hcsmoe.CLASS_PREFIX, modeling_hcsmoe_factored.CLASS_PREFIX)


def build_config(config: Mapping[str, Any]) -> PreTrainedConfig:
    """Builds the config object of the model that a raw config describes, for the unquantised weights.

    Raises:
        SourceError: If a count or a size is not a whole number in a plausible range.
        UnsupportedModelError: If transformers does not know the model, or it does not generate text.
    """
    if config.get("model_type") is None:
        raise UnsupportedModelError(
            "config.json has no model_type, so it does not say what the model is.",
            hint="pass the folder or repository that holds the model in the format of transformers",
        )
    published = str(config["model_type"])
    model_type = SAME_CODE.get(published, published)
    if model_type not in CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"model_type {published!r} is not part of transformers {transformers.__version__}; "
            "hcsmoe runs no code from a repository.",
            hint="see 'hcsmoe architectures' for what is supported, or upgrade transformers",
        )
    # Classes of transformers edit nested sections in place.
    raw = copy.deepcopy(decode_special_floats(buildable({**config, "model_type": model_type})))
    for section in (raw, *(raw.get(name) for name in SECTIONS)):
        if isinstance(section, dict):
            section.pop("quantization_config", None)
    built = without_foreign_padding(CONFIG_MAPPING[model_type].from_dict(raw))
    found = _find_class(built)
    if found is None:
        raise UnsupportedModelError(
            f"model_type {published!r} is not a language model that generates text from text.",
            hint="see 'hcsmoe architectures' for what is supported",
        )
    return built.get_text_config() if found.config_class is built.sub_configs.get("text_config") else built


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The model class of a config from ``build_config``: the one that its checkpoint names, or that transformers maps.

    For a result that brings a modelling file, the class that its own one extends.
    """
    found = _find_class(config)
    assert found is not None, "build_config refuses a config without a language model"
    return found


def _find_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    if getattr(config, "is_encoder_decoder", False):
        return _mapped_class(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, config)
    return (
        _named_class(config)
        or _mapped_class(MODEL_FOR_CAUSAL_LM_MAPPING, config)
        or _mapped_class(MODEL_FOR_MULTIMODAL_LM_MAPPING, config)
    )


def _named_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The language model of transformers that ``architectures`` names, if it can be built from the config."""
    own = {type(config), config.sub_configs.get("text_config")}
    for architecture in config.architectures or ():
        name = architecture
        for prefix in _OWN_PREFIXES:
            name = name.removeprefix(prefix)
        found = (
            getattr(transformers, name, None) if name.endswith(("ForCausalLM", "ForConditionalGeneration")) else None
        )
        if found is not None and found.config_class in own:
            named: type[PreTrainedModel] = found
            return named
    return None


def _mapped_class(mapping: Any, config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class of transformers itself that an auto class maps; other code may have added classes to that map."""
    if type(config) not in mapping:
        return None
    mapped = mapping[type(config)]
    found: type[PreTrainedModel] = mapped[0] if isinstance(mapped, tuple) else mapped
    return found if found.__module__.startswith("transformers.") else None
