"""What a raw ``config.json`` must say before a model is built from it, and what of it a model is built from.

Models are built on the meta device to learn names and shapes, and run on calibration text only. What the file says
about a machine (attention kernels) or about generation (token ids) is not needed for that, and may not work here.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig

from hcsmoe_hub.checkpoint.config_json import COUNT_KEYS, QUANTIZATION_KEYS, only_value, sections
from hcsmoe_hub.checkpoint.tensors import StoredTensor
from hcsmoe_hub.errors import SourceError, UnsupportedModelError
from hcsmoe_hub.model.transformers_seam import ATTENTION_KEY, EXPERTS_KEY, decode_special_floats

# Published under a type of its own, with the code of another one that transformers knows.
SAME_CODE: Mapping[str, str] = {"kimi_k2": "deepseek_v3"}
# Implementations that a machine may not have; the choice of transformers itself always works.
_KERNELS = frozenset(
    {
        "attn_implementation",
        ATTENTION_KEY,
        f"{ATTENTION_KEY}_internal",
        "experts_implementation",
        EXPERTS_KEY,
        f"{EXPERTS_KEY}_internal",
    }
)
_LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")
# Sizes that every model has.
_POSITIVE = frozenset(
    {
        *_LAYERS,
        "hidden_size",
        "d_model",
        "vocab_size",
        "num_attention_heads",
        "n_heads",
        "intermediate_size",
        "moe_intermediate_size",
        "max_position_embeddings",
    }
)
# Sizes of the experts, which some files repeat for every layer as well.
_WIDTHS = frozenset(
    {
        "intermediate_size",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "n_shared_experts",
        "num_shared_experts",
        "moe_num_shared_experts",
    }
)
# Names of other numbers of things and of sizes, which a model may do without.
_SIZE = re.compile(r"(?:^|_)(?:num|n)_|_(?:size|dim|rank|heads|layers|experts)$")
# Windows and chunks of -1 are unlimited.
_UNLIMITED = re.compile(r"window|chunk|block")
# Far beyond every model; a size below it makes no tensor that torch cannot describe.
_LARGEST = 100_000_000
_LARGEST_COUNT = 10_000
# How much of a long value a message shows.
_SHOWN = 40
_HINT = "correct config.json, or download it again"


def check_sizes(config: Mapping[str, Any]) -> None:
    """Checks every count and size of a raw config by itself: a whole number in a plausible range.

    Raises:
        SourceError: If one is not.
        UnsupportedModelError: If layers have different numbers of experts.
    """
    for section in sections(config):
        for key, value in section.items():
            if value is None:
                continue
            if key in QUANTIZATION_KEYS:
                _check_object(key, value)
            elif key in COUNT_KEYS:
                _check_size(key, only_value(key, value), least=0, most=_LARGEST_COUNT)
            elif key in _POSITIVE and not isinstance(value, list):
                _check_size(key, value, least=1, most=_LARGEST_COUNT if key in _LAYERS else _LARGEST)
            elif _SIZE.search(key) and not _UNLIMITED.search(key) and isinstance(value, int):
                _check_size(key, value, least=0, most=_LARGEST)


def _check_object(key: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise SourceError(f"config.json says {key} = {_short(value)}, but it must be an object.", hint=_HINT)


def _check_size(key: str, value: Any, *, least: int, most: int) -> None:
    if isinstance(value, int) and not isinstance(value, bool) and least <= value <= most:
        return
    raise SourceError(
        f"config.json says {key} = {_short(value)}, but it must be a whole number from {least} to {most}.", hint=_HINT
    )


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."


def check_stored(config: Mapping[str, Any], tensors: Mapping[str, StoredTensor], *, label: str) -> None:
    """Checks that the layers that a raw config describes can be stored, before a model of that size is built.

    Raises:
        SourceError: If no stored key numbers as many layers.
    """
    numbers = (int(number) for key in tensors for number in re.findall(r"\.(\d{1,9})(?=\.)", key))
    most = max(numbers, default=0) + 1
    for section in sections(config):
        for key in _LAYERS:
            value = section.get(key)
            if isinstance(value, int) and value > most:
                raise SourceError(
                    f"config.json of {label} says {key} = {value}, but the stored tensors belong to at most {most} "
                    "layers.",
                    hint="config.json and the weights do not belong together, or the download is incomplete",
                )


def buildable(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a raw config that a model is built from.

    Lists that give every layer the same number become that number; names of kernels are left out.

    Raises:
        SourceError: If a count or a size is not a whole number in a plausible range.
        UnsupportedModelError: If layers have different numbers of experts.
    """
    check_sizes(config)
    return _buildable(config, CONFIG_MAPPING[config["model_type"]])


def _buildable(config: Mapping[str, Any], kind: type[PreTrainedConfig] | None) -> dict[str, Any]:
    types = {} if kind is None else {field.name: field.type for field in dataclasses.fields(kind)}
    nested: Mapping[str, Any] = {} if kind is None else kind.sub_configs
    built = {}
    for key, value in config.items():
        if key in _KERNELS:
            continue
        if key in COUNT_KEYS or (key in _WIDTHS and types.get(key) in (int, int | None)):
            built[key] = only_value(key, value)
        else:
            built[key] = _buildable(value, _config_class(nested.get(key))) if isinstance(value, dict) else value
    return built


def _config_class(found: Any) -> type[PreTrainedConfig] | None:
    """A class of configs; some sections are built by one that is chosen later."""
    is_class = isinstance(found, type) and issubclass(found, PreTrainedConfig) and dataclasses.is_dataclass(found)
    return found if is_class else None


def without_foreign_padding(config: PreTrainedConfig) -> PreTrainedConfig:
    """Replaces a padding token outside the vocabulary, with which an embedding cannot be built; nothing here pads."""
    text: Any = config.get_text_config()
    for part in (config, text):
        padding = getattr(part, "pad_token_id", None)
        if isinstance(padding, int) and not 0 <= padding < getattr(text, "vocab_size", padding + 1):
            part.pad_token_id = 0
    return config


def loading_problem(config: Mapping[str, Any]) -> str | None:
    """Why plain transformers cannot load a checkpoint that hcsmoe converts all the same; ``None`` if it can.

    Args:
        config: A raw config that ``buildable`` accepts.
    """
    model_type = SAME_CODE.get(config["model_type"], config["model_type"])
    for section in sections(config):
        padding, words = section.get("pad_token_id"), section.get("vocab_size")
        if isinstance(padding, int) and isinstance(words, int) and not -words <= padding < words:
            return f"pad_token_id = {padding} is outside the vocabulary of {words} tokens"
    try:
        CONFIG_MAPPING[model_type].from_dict(decode_special_floats(config))
    except StrictDataclassError as error:
        return _first_lines(error)
    return None


@contextmanager
def translated_errors(label: str) -> Iterator[None]:
    """Turns the errors of transformers over a config that it cannot build into one message.

    Args:
        label: Name of the source.

    Raises:
        SourceError: In place of each of them.
        UnsupportedModelError: If the model needs a package that is not installed.
    """
    try:
        yield
    except ImportError as error:
        raise UnsupportedModelError(
            f"transformers cannot build the model of {label} without another package: {_first_lines(error)}",
            hint="install the package that it names",
        ) from error
    except (
        StrictDataclassError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        AssertionError,
        ArithmeticError,
        RuntimeError,
    ) as error:
        raise SourceError(
            f"transformers cannot build a model from config.json of {label}: {_first_lines(error)}", hint=_HINT
        ) from error


def _first_lines(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2])
