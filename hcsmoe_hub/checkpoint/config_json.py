"""Edits the raw ``config.json``: only the keys that a conversion changes, under the names that the source uses.

Saving the config through transformers would rename keys and add dozens of defaults, but other programs read the
source's spelling. The tuples below list every name that a count has.
"""

import copy
import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from hcsmoe_hub.checkpoint.modeling_hcsmoe import SECTION
from hcsmoe_hub.errors import PlanError, SourceError, UnsupportedModelError

EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K_KEYS = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_k",
    "moe_top_k",
    "top_k_experts",
)
GROUP_KEYS = ("n_group", "num_expert_group")
TOP_GROUP_KEYS = ("topk_group",)
# Tokens of a sequence, and share of those of a batch, that an expert has room for: fewer experts take more of them.
CAPACITY_KEYS = ("expert_capacity",)
CAPACITY_SHARE_KEYS = ("moe_eval_capacity_token_fraction",)
# Routers that always choose the same number of experts, which their configs do not name.
FIXED_TOP_K: Mapping[str, int] = {"switch_transformers": 1, "nllb-moe": 2}
# How weights are quantised; the second is what compressed-tensors called it first.
QUANTIZATION_KEYS = ("quantization_config", "compression_config")
# Multi-token prediction layers: heads with their own experts, which transformers models do not load.
MTP_KEYS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "num_mtp_modules", "mtp_num_layers")
# Numbers that a router depends on.
COUNT_KEYS = frozenset({*EXPERT_KEYS, *TOP_K_KEYS, *GROUP_KEYS, *TOP_GROUP_KEYS})
# Sections in which a language model's settings can be nested.
SECTIONS = ("text_config", "ffn_config", "thinker_config")
# How many different values a message shows.
SHOWN_VALUES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class MoESettings:
    """Expert counts of a config.

    Attributes:
        experts: Routed experts per MoE layer.
        experts_per_token: Active experts per token, the router's top-k.
        groups: Number of groups for group-limited routing, 1 without.
        groups_per_token: Number of groups that the router may select a token's experts from.
    """

    experts: int
    experts_per_token: int
    groups: int = 1
    groups_per_token: int = 1


def sections(config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The top level of a raw config and every nested section that may hold expert counts."""
    yield config  # type: ignore[misc]
    for name in SECTIONS:
        if isinstance(section := config.get(name), dict):
            yield from sections(section)


def only_value(key: str, value: Any) -> Any:
    """A count of a raw config, or the one that a list repeats for every layer, as published Hunyuan configs do.

    Raises:
        UnsupportedModelError: If layers have different counts.
    """
    if not isinstance(value, list):
        return value
    different = list(dict.fromkeys(map(str, value)))
    if len(different) != 1:
        shown = ", ".join(different[:SHOWN_VALUES]) + (", ..." if len(different) > SHOWN_VALUES else "")
        found = f"gives layers different values of {key}: {shown}" if different else f"gives an empty list as {key}"
        raise UnsupportedModelError(
            f"config.json {found}; hcsmoe converts models whose MoE layers all have the same number.",
            hint="convert a checkpoint whose layers are alike",
        )
    return value[0]


def _parts(config: Any) -> Iterator[Any]:
    """A built config and every nested section that may hold expert counts."""
    yield config
    for name in SECTIONS:
        if (section := getattr(config, name, None)) is not None:
            yield from _parts(section)


def _built_value(config: PreTrainedConfig, keys: tuple[str, ...]) -> int | None:
    """Value of the first key that a built config or one of its sections has."""
    for part in _parts(config):
        # The class's own name for the count takes precedence over a key that merely occurs in the file.
        own = {field.name for field in dataclasses.fields(part)} if dataclasses.is_dataclass(part) else set()
        for key in sorted(keys, key=lambda key: key not in own):
            value = getattr(part, key, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None


def has_expert_count(config: Mapping[str, Any]) -> bool:
    """Whether a raw config gives a number of experts at all."""
    return any(section.get(key) for section in sections(config) for key in EXPERT_KEYS)


def quantization_method(config: Mapping[str, Any]) -> str | None:
    """Name of the quantisation of a raw config, or ``None``."""
    found = (section.get("quantization_config") for section in sections(config))
    settings = next((value for value in found if value), None)
    if settings is None:
        return None
    return str(settings.get("quant_method", "an unnamed format")) if isinstance(settings, dict) else str(settings)


def read_settings(config: PreTrainedConfig) -> MoESettings:
    """Reads the expert counts of a built config, defaults included.

    Raises:
        SourceError: If more experts are active than there are.
        UnsupportedModelError: If the model is dense, or does not say how many experts are active.
    """
    experts = _built_value(config, EXPERT_KEYS)
    top_k = FIXED_TOP_K.get(config.model_type) or _built_value(config, TOP_K_KEYS)
    if not experts:
        found = "does not give a number of experts" if experts is None else "gives a number of experts of 0"
        raise UnsupportedModelError(
            f"model_type {config.model_type!r} is a dense model: its config {found}.",
            hint="pass a Mixture-of-Experts checkpoint; see 'hcsmoe architectures'",
        )
    if not top_k:
        raise UnsupportedModelError(
            f"the config of model_type {config.model_type!r} gives {experts} experts, but not how many of them are "
            "active per token.",
            hint=f"add {TOP_K_KEYS[0]} to config.json, under the name that its class uses",
        )
    if top_k > experts:
        raise SourceError(
            f"config.json says that {top_k} experts are active per token, but gives each layer {experts}.",
            hint="correct config.json, or download it again",
        )
    groups = _built_value(config, GROUP_KEYS) or 1
    return MoESettings(
        experts=experts,
        experts_per_token=top_k,
        groups=groups,
        groups_per_token=_built_value(config, TOP_GROUP_KEYS) or groups,
    )


def check_aliases(config: Mapping[str, Any], before: MoESettings) -> None:
    """Checks that all aliases of the expert count, and of the active experts per token, agree.

    Raises:
        SourceError: If two aliases disagree: programs would read different counts from the same file.
        UnsupportedModelError: If layers have different counts.
    """
    counts = ((EXPERT_KEYS, before.experts, "experts"), (TOP_K_KEYS, before.experts_per_token, "experts per token"))
    for section in sections(config):
        for keys, count, noun in counts:
            for key in keys:
                value = only_value(key, section.get(key))
                if isinstance(value, int) and value != count:
                    raise SourceError(
                        f"config.json says {key} = {value}, but the model is built with {count} {noun}.",
                        hint="correct config.json; all names of a count must have the same value",
                    )


def _is_count(value: Any, count: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value == count


def _set_all(config: dict[str, Any], keys: tuple[str, ...], before: int, after: int) -> bool:
    """Sets every alias that holds ``before``; returns whether there was one."""
    found = False
    for section in sections(config):
        for key in keys:
            value = section.get(key)
            if _is_count(only_value(key, value), before):
                section[key] = [after] * len(value) if isinstance(value, list) else after
                found = True
    return found


def edit(
    config: Mapping[str, Any],
    built: PreTrainedConfig,
    before: MoESettings,
    after: MoESettings,
    *,
    without_mtp: bool = False,
    without_quantization: bool = False,
) -> dict[str, Any]:
    """Returns a copy of a raw config for ``after`` experts.

    Sets every alias of a count that is present, as a number or a list like the source, and adds a key only where the
    source relies on a default of its class.

    Args:
        config: Raw config of the source.
        built: The same config as transformers builds it, for the names of defaults.
        before: Counts of the source.
        after: Counts of the result.
        without_mtp: Whether multi-token prediction layers were dropped.
        without_quantization: Whether the weights were dequantised.
    """
    edited = copy.deepcopy(dict(config))
    changes = (
        (EXPERT_KEYS, before.experts, after.experts),
        (TOP_K_KEYS, before.experts_per_token, after.experts_per_token),
        (GROUP_KEYS, before.groups, after.groups),
        (TOP_GROUP_KEYS, before.groups_per_token, after.groups_per_token),
    )
    for keys, old, new in changes:
        if new != old and not _set_all(edited, keys, old, new):
            _set_default(edited, built, keys, new)
    if after.experts != before.experts:
        _set_capacity(edited, built, before.experts, after.experts)
    for section in sections(edited):
        if without_quantization:
            for key in QUANTIZATION_KEYS:
                section.pop(key, None)
        for key in MTP_KEYS if without_mtp else ():
            if section.get(key):
                section[key] = 0
    return edited


def _set_capacity(config: dict[str, Any], built: PreTrainedConfig, before: int, after: int) -> None:
    """Gives every expert as much more room as there are fewer of them, so that as many tokens are processed."""
    for key in (*CAPACITY_KEYS, *CAPACITY_SHARE_KEYS):
        value = config.get(key, getattr(built, key, None))
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            continue
        if key in CAPACITY_KEYS:
            config[key] = -(-int(value) * before // after)
        elif value < 1:
            config[key] = min(1.0, value * before / after)


def _set_default(config: dict[str, Any], built: PreTrainedConfig, keys: tuple[str, ...], value: int) -> None:
    """Adds a count that the source left to the default of its config class."""
    name = next((key for key in keys if hasattr(built, key) and key not in built.attribute_map), None)
    if name is None:
        raise PlanError(
            f"config.json has none of the keys {', '.join(keys)}, so the new count cannot be written.",
            hint="add the count to config.json under the name that its class uses",
        )
    _section_of(config, built, name)[name] = value


def size_keys(config: Mapping[str, Any], built: PreTrainedConfig, value: int, name: re.Pattern[str]) -> list[str]:
    """Keys of a certain kind of name that have a value, in a raw config or by a default of its class.

    Args:
        config: Raw config.
        built: The same config as transformers builds it.
        value: What the keys hold, as a number or a list of it.
        name: What the names contain.
    """
    stored = (key for section in sections(config) for key, held in section.items() if _holds(held, value))
    defaults = (key for part in _parts(built) for key, held in vars(part).items() if _holds(held, value))
    return list(dict.fromkeys(key for key in (*stored, *defaults) if name.search(key)))


def _holds(held: Any, value: int) -> bool:
    return bool(held) and set(map(repr, held if isinstance(held, list) else [held])) == {repr(value)}


def with_value(config: Mapping[str, Any], built: PreTrainedConfig, key: str, before: int, after: int) -> dict[str, Any]:
    """A copy of a raw config in which a key that holds one value holds another one.

    Args:
        config: Raw config.
        built: The same config as transformers builds it, for values that are defaults of its class.
        key: Name of the key.
        before: Its value, as a number or a list of it.
        after: Its new value.
    """
    edited = copy.deepcopy(dict(config))
    found = [section for section in sections(edited) if _holds(section.get(key), before)]
    for section in found:
        section[key] = [after] * len(section[key]) if isinstance(section[key], list) else after
    if not found:
        _section_of(edited, built, key)[key] = after
    return edited


def _section_of(config: dict[str, Any], built: PreTrainedConfig, key: str) -> dict[str, Any]:
    """The section of a raw config that a default of its class belongs to."""
    text = config.get("thinker_config", config).get("text_config")
    section = text if isinstance(text, dict) else config
    if not hasattr(built, key):
        name = next(name for name in SECTIONS if hasattr(getattr(built, name, None), key))
        section = section.setdefault(name, {})
    return section


def check_counts(before: MoESettings, *, experts: int, experts_per_token: int | None, label: str) -> MoESettings:
    """Checks that the router can select from K experts.

    Returns:
        The settings of the result; its groups are reset to one when K experts cannot be split into them.

    Raises:
        PlanError: If K is out of range, or too small for the router's top-k or groups.
    """
    if not 2 <= experts <= before.experts:
        why = f"it has only {before.experts}" if experts > before.experts else "a router needs at least 2"
        raise PlanError(
            f"cannot keep {experts} experts per layer of {label}: {why}.",
            hint=f"use `experts` with a number from 2 to {before.experts}",
        )
    top_k = before.experts_per_token if experts_per_token is None else experts_per_token
    if top_k < 1:
        raise PlanError(f"a token cannot have {top_k} active experts.", hint="use `experts_per_token=1` or more")
    if top_k > experts:
        chosen = "selects" if experts_per_token is None else "would select"
        fewer = f"lower the selection with `experts_per_token={experts}`"
        raise PlanError(
            f"cannot keep {experts} of {before.experts} experts: the router of {label} {chosen} {top_k} experts per "
            "token, and a layer needs at least as many as it selects.",
            hint=f"use `experts={top_k}` or more, or {fewer}" if top_k <= before.experts else fewer,
        )
    if before.groups > 1 and experts % before.groups:
        return MoESettings(experts=experts, experts_per_token=top_k)
    per_group = experts // before.groups
    if before.groups > 1 and (per_group < 2 or top_k > before.groups_per_token * per_group):
        needed = before.groups * max(2, -(-top_k // before.groups_per_token))
        raise PlanError(
            f"{experts} experts in {before.groups} groups are {per_group} per group, but the router of {label} scores "
            f"a group by its best two experts and selects {top_k} experts from {before.groups_per_token} groups.",
            hint=f"use `experts={needed}` or more",
        )
    return MoESettings(
        experts=experts,
        experts_per_token=top_k,
        groups=before.groups,
        groups_per_token=before.groups_per_token,
    )


def plain_config(raw_config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a copy of a raw config without its expert map: the model with N router rows and N experts."""
    config = copy.deepcopy(dict(raw_config))
    for section in (config, config.get("text_config")):
        if isinstance(section, dict):
            section.pop(SECTION, None)
    return config
