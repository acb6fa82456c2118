"""Accounts for every stored tensor: copied as it is, merged with the experts, dequantised, or dropped with a reason."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hcsmoe_hub.errors import UnsupportedModelError
from hcsmoe_hub.model.architectures import REPORT_HINT
from hcsmoe_hub.model.skeleton import Group
from hcsmoe_hub.model.source_model import SourceModel
from hcsmoe_hub.options import Layout
from hcsmoe_hub.planning.result_shapes import edited_names

Output = tuple[str, torch.dtype, tuple[int, ...]]


@dataclass(slots=True)
class Account:
    """What becomes of the stored tensors.

    Attributes:
        copied: Keys whose bytes go to the result as they are.
        unread: Copied keys that the model does not load (a vision tower, say).
        rewritten: Layer (``None`` outside the layers) to the parameters that are written from memory.
        dropped: Keys that are left out, each with its reason.
        outputs: Name, dtype and shape of every tensor of the result, in writing order.
    """

    copied: set[str] = field(default_factory=set)
    unread: list[str] = field(default_factory=list)
    rewritten: dict[int | None, list[str]] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    outputs: list[Output] = field(default_factory=list)


def _stack_prefixes(groups: Mapping[int | None, Group]) -> set[str]:
    """How the stored keys of the decoder layers begin, up to the number of the layer: ``model.layers.``."""
    keys = (key for layer, group in groups.items() if layer is not None for key in group.targets)
    return {match.group(1) for key in keys if (match := re.match(r"(.*?\.)\d+\.", key))}


def _is_multi_token_prediction(key: str, prefixes: set[str], layers: int) -> bool:
    """Whether a key belongs to a prediction head beyond the decoder: ``mtp.*``, or a layer after the last one."""
    if re.search(r"(?:^|\.)mtp(?:_\w+)?\.", key):
        return True
    match = re.match(r"(.*?\.)(\d+)\.", key)
    return match is not None and match.group(1) in prefixes and int(match.group(2)) >= layers


def _sort_unused(account: Account, model: SourceModel, *, keep_mtp: bool) -> None:
    """Decides about the keys that the model does not load."""
    prefixes, layers = _stack_prefixes(model.groups), len(model.skeleton.layers)
    for key in model.unused:
        if _is_multi_token_prediction(key, prefixes, layers):
            if keep_mtp:
                account.unread.append(key)
            else:
                account.dropped[key] = "multi-token prediction layer: it has experts of its own that no model loads"
        elif re.search(r"\.(experts|router)\.", key):
            raise UnsupportedModelError(
                f"tensor {key!r} looks like a part of an expert, but the model does not use it; "
                "copying it would leave a checkpoint that contradicts itself.",
                hint=REPORT_HINT,
            )
        else:
            account.unread.append(key)
    account.copied.update(account.unread)


def take_account(model: SourceModel, result: Mapping[str, Tensor], *, layout: Layout, keep_mtp: bool) -> Account:
    """Decides what becomes of every stored tensor, and names every tensor of the result.

    Args:
        model: The source.
        result: Parameters and buffers of the result, on any device, as ``result_state`` makes them.
        layout: How the result writes its experts, which decides whether the router is written as well.
        keep_mtp: Whether multi-token prediction layers still fit the result.

    Raises:
        UnsupportedModelError: If an expert-sized tensor cannot be written under a name of the source.
    """
    stored, account = model.source.tensors, Account()
    _sort_unused(account, model, keep_mtp=keep_mtp)
    edited = edited_names(model, layout)
    for layer in sorted(model.groups, key=lambda layer: -1 if layer is None else layer):
        group = model.groups[layer]
        rewritten = [name for name in dict.fromkeys(group.targets.values()) if name in edited | group.dequantized]
        account.rewritten[layer] = rewritten
        copied = [key for key in group.targets if group.targets[key] not in rewritten]
        account.copied.update(copied)
        tensors = model.skeleton.to_stored({name: result[name] for name in rewritten}, group.conversions)
        for name, tensor in tensors.items():
            is_kept = name in stored and group.targets.get(name) not in group.dequantized
            dtype = stored[name].dtype if is_kept else tensor.dtype
            account.outputs.append((name, dtype, tuple(tensor.shape)))
        account.outputs.extend((key, stored[key].dtype, stored[key].shape) for key in copied)
        unknown = tensors.keys() - group.targets.keys()
        if unknown and not group.dequantized:
            raise UnsupportedModelError(
                f"the result would need a tensor {sorted(unknown)[0]!r} that the source lacks.", hint=REPORT_HINT
            )
    account.outputs.extend((key, stored[key].dtype, stored[key].shape) for key in account.unread)
    return account
