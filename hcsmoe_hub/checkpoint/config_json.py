"""Edits the raw ``config.json``: only the keys that the conversion owns, in the dialect that the source wrote.

Saving the config through transformers would rename keys and add dozens of defaults, and other programs read the
source's spelling. See the keys below for every name that a count goes by.
"""

import copy
import dataclasses
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
# Multi-token prediction layers: heads with experts of their own that no transformers model loads.
MTP_KEYS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "num_mtp_modules", "mtp_num_layers")
# Where a language model's own settings can be nested.
SECTIONS = ("text_config", "ffn_config")


@dataclass(frozen=True, slots=True, kw_only=True)
class MoESettings:
    """What a config says about its experts.

    Attributes:
        experts: Routed experts per MoE layer.
        experts_per_token: How many of them each token visits.
        groups: Number of groups for group-limited routing, 1 without.
        groups_per_token: How many groups each token may choose from.
    """

    experts: int
    experts_per_token: int
    groups: int = 1
    groups_per_token: int = 1


def _sections(config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The top level and every nested section that may hold our keys."""
    yield config  # type: ignore[misc]
    for name in SECTIONS:
        if isinstance(section := config.get(name), dict):
            yield from _sections(section)


def _built_value(config: PreTrainedConfig, keys: tuple[str, ...]) -> int | None:
    """Value of the first key that a built config has, looking into its sections as well."""
    for part in (config, *(getattr(config, name, None) for name in SECTIONS)):
        # The name that the class itself gave the count goes before a key that merely stands in the file.
        own = {field.name for field in dataclasses.fields(part)} if dataclasses.is_dataclass(part) else set()
        for key in sorted(keys, key=lambda key: key not in own):
            value = getattr(part, key, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None


def has_expert_count(config: Mapping[str, Any]) -> bool:
    """Whether a raw config names a number of experts at all."""
    return any(section.get(key) for section in _sections(config) for key in EXPERT_KEYS)


def read_settings(config: PreTrainedConfig) -> MoESettings:
    """Reads the expert counts of a built config, defaults included.

    Raises:
        UnsupportedModelError: If there are no experts.
    """
    experts = _built_value(config, EXPERT_KEYS)
    top_k = _built_value(config, TOP_K_KEYS)
    if not experts or not top_k:
        raise UnsupportedModelError(
            f"model_type {config.model_type!r} is a dense model: its config names no experts to merge.",
            hint="pass a Mixture-of-Experts checkpoint; see 'hcsmoe architectures'",
        )
    groups = _built_value(config, GROUP_KEYS) or 1
    return MoESettings(
        experts=experts,
        experts_per_token=top_k,
        groups=groups,
        groups_per_token=_built_value(config, TOP_GROUP_KEYS) or groups,
    )


def check_aliases(config: Mapping[str, Any], before: MoESettings) -> None:
    """Checks that every name of the expert count, and of the count per token, says the same.

    Raises:
        SourceError: If two aliases disagree: programs would read different counts from the same file.
    """
    counts = ((EXPERT_KEYS, before.experts, "experts"), (TOP_K_KEYS, before.experts_per_token, "experts per token"))
    for section in _sections(config):
        for keys, count, noun in counts:
            for key in keys:
                value = section.get(key)
                if isinstance(value, int) and value != count:
                    raise SourceError(
                        f"config.json says {key} = {value}, but the model is built with {count} {noun}.",
                        hint="correct config.json; every name of a count must hold the same number",
                    )


def _set_all(config: dict[str, Any], keys: tuple[str, ...], before: int, after: int) -> bool:
    """Sets every alias that holds ``before``; tells whether there was one."""
    found = False
    for section in _sections(config):
        for key in keys:
            value = section.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and value == before:
                section[key] = after
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

    Every alias of a count that is present is set, and none is added unless the source relied on a default of its class.

    Args:
        config: Raw config of the source.
        built: The same config as transformers builds it, for the names of defaults.
        before: What the source says.
        after: What the result has.
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
    for section in _sections(edited):
        if without_quantization:
            section.pop("quantization_config", None)
        for key in MTP_KEYS if without_mtp else ():
            if section.get(key):
                section[key] = 0
    return edited


def _set_default(config: dict[str, Any], built: PreTrainedConfig, keys: tuple[str, ...], value: int) -> None:
    """Writes down a count that the source left to the default of its config class."""
    text = config.get("text_config")
    section = text if isinstance(text, dict) else config
    name = next((key for key in keys if hasattr(built, key) and key not in built.attribute_map), None)
    if name is None:
        raise PlanError(
            f"config.json has none of the keys {', '.join(keys)}, so the new count cannot be written.",
            hint="write the count into config.json under the name that its class uses",
        )
    section[name] = value


def check_counts(before: MoESettings, *, experts: int, experts_per_token: int | None, label: str) -> MoESettings:
    """Checks that the router can still choose from K experts.

    Returns:
        The settings of the result; its groups are reset to one when K experts cannot be split into them.

    Raises:
        PlanError: If K is no sensible count, or the router could not work with it.
    """
    if not 2 <= experts <= before.experts:
        why = f"it has only {before.experts}" if experts > before.experts else "a router needs a choice"
        raise PlanError(
            f"cannot keep {experts} experts per layer of {label}: {why}.",
            hint=f"use --experts with a number from 2 to {before.experts}",
        )
    top_k = before.experts_per_token if experts_per_token is None else experts_per_token
    if top_k < 1:
        raise PlanError(f"a token cannot visit {top_k} experts.", hint="use --experts-per-token with 1 or more")
    if top_k > experts:
        chosen = "selects" if experts_per_token is None else "would select"
        fewer = f"lower the selection with --experts-per-token {experts}"
        raise PlanError(
            f"cannot keep {experts} of {before.experts} experts: the router of {label} {chosen} {top_k} experts per "
            "token, and a layer needs at least as many as it selects.",
            hint=f"use --experts {top_k} or more, or {fewer}" if top_k <= before.experts else fewer,
        )
    if before.groups > 1 and experts % before.groups:
        return MoESettings(experts=experts, experts_per_token=top_k)
    per_group = experts // before.groups
    if before.groups > 1 and (per_group < 2 or top_k > before.groups_per_token * per_group):
        needed = before.groups * max(2, -(-top_k // before.groups_per_token))
        raise PlanError(
            f"{experts} experts in {before.groups} groups are {per_group} per group, but the router of {label} scores "
            f"a group by its best two experts and chooses {top_k} experts from {before.groups_per_token} groups.",
            hint=f"use --experts {needed} or more",
        )
    return MoESettings(
        experts=experts,
        experts_per_token=top_k,
        groups=before.groups,
        groups_per_token=before.groups_per_token,
    )


def plain_config(raw_config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a copy of a raw config without the map: the model of N router rows and N experts."""
    config = copy.deepcopy(dict(raw_config))
    for section in (config, config.get("text_config")):
        if isinstance(section, dict):
            section.pop(SECTION, None)
    return config
