"""Accounts for every stored tensor: copied as it is, merged with the experts, dequantised, or dropped with a reason."""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hcsmoe_hub.checkpoint.formats import LogicalTensor
from hcsmoe_hub.errors import UnsupportedModelError
from hcsmoe_hub.model.architectures import REPORT_HINT
from hcsmoe_hub.model.mtp import has_experts, why_unknown
from hcsmoe_hub.model.source_model import SourceModel
from hcsmoe_hub.options import Layout
from hcsmoe_hub.planning.result_shapes import edited_names

Output = tuple[str, torch.dtype, tuple[int, ...]]


@dataclass(slots=True)
class Account:
    """What becomes of the stored tensors, all by the names that the model sees.

    Attributes:
        copied: Tensors whose bytes go to the result as they are.
        decoded: Tensors that the result stores in the dtype of the model, but are not changed otherwise.
        unread: Those of both that text does not run through (a vision tower, say).
        rewritten: Layer (``None`` outside the layers) to the parameters that are written from memory.
        dropped: Tensors that are left out, each with its reason.
        outputs: Name, dtype and shape of every stored tensor of the result, in writing order.
        keeps_format: Whether tensors of a quantised format stay in it.
    """

    keeps_format: bool
    copied: set[str] = field(default_factory=set)
    decoded: set[str] = field(default_factory=set)
    unread: list[str] = field(default_factory=list)
    rewritten: dict[int | None, list[str]] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    outputs: list[Output] = field(default_factory=list)

    def keep(self, tensor: LogicalTensor) -> None:
        """Keeps a tensor whose numbers do not change."""
        (self.copied if tensor.codec is None or self.keeps_format else self.decoded).add(tensor.name)
        self.add(tensor, tensor.shape)

    def add(self, tensor: LogicalTensor, shape: tuple[int, ...]) -> None:
        """Adds what the result stores of a tensor.

        Args:
            tensor: The tensor in the source.
            shape: Its shape in the result.
        """
        if tensor.codec is None or not self.keeps_format:
            self.outputs.append((tensor.name, tensor.dtype, shape))
            return
        names = tensor.codec.part_names(tensor.name)
        self.outputs.extend((names[role], *spec) for role, spec in tensor.codec.part_specs(shape).items())


@dataclass(frozen=True, slots=True, kw_only=True)
class MtpRule:
    """What becomes of the MTP heads that are not decoder layers of the plan's model.

    Attributes:
        dropped: Why they are dropped in any case; ``None`` if they are not.
        fits: Whether the number of experts stays what it was, so that they can be copied whatever they are.
    """

    dropped: str | None = None
    fits: bool = False

    def reason(self, model: SourceModel) -> str | None:
        """Why the MTP heads that a model does not load are left out; ``None`` if they are copied."""
        if self.dropped is not None or self.fits or not has_experts(model.mtp_keys):
            return self.dropped
        return f"MTP head with experts of its own, {model.mtp_problem or why_unknown(model.skeleton.config)}"


def _sort_unused(account: Account, model: SourceModel, rule: MtpRule) -> None:
    """Decides about the tensors that the model does not load."""
    copies = frozenset() if model.skeleton.mtp is None else model.skeleton.mtp.copies
    heads = set(model.mtp_keys) - copies
    reason = rule.reason(model) if heads else None
    account.unread.extend(model.placement.aside)
    for name in model.placement.unused:
        if name in heads and reason is not None:
            account.dropped[name] = reason
        elif name not in heads and re.search(r"\.(experts|router)\.", name):
            raise UnsupportedModelError(
                f"tensor {name!r} looks like a part of an expert, but the model does not use it; "
                "copying it would leave a checkpoint that contradicts itself.",
                hint=REPORT_HINT,
            )
        else:
            account.unread.append(name)


def take_account(
    model: SourceModel, result: Mapping[str, Tensor], *, layout: Layout, mtp: MtpRule, keep_format: bool
) -> Account:
    """Decides what becomes of every stored tensor, and names every tensor of the result.

    Args:
        model: The source.
        result: Parameters and buffers of the result as it is stored, on any device; those that the model does not have
            are factors of its experts, in place of their matrices.
        layout: How the result writes its experts, which decides whether the router is written as well.
        mtp: What becomes of MTP heads that the model does not load.
        keep_format: Whether tensors of a quantised format stay in it.

    Raises:
        UnsupportedModelError: If an expert-sized tensor cannot be written under a name of the source.
    """
    account = Account(keeps_format=keep_format)
    _sort_unused(account, model, mtp)
    edited = edited_names(model, layout)
    added = defaultdict[int | None, list[str]](list)
    for name in result.keys() - model.skeleton.state.keys():
        added[model.skeleton.layer_of(name)].append(name)
    for layer in sorted(model.groups, key=lambda layer: -1 if layer is None else layer):
        group = model.groups[layer]
        changed = [name for name in dict.fromkeys(group.targets.values()) if name in edited]
        rewritten = [name for name in changed if name in result]
        factors = sorted(added[layer])
        account.rewritten[layer] = [*rewritten, *factors]
        tensors = model.skeleton.to_stored({name: result[name] for name in rewritten}, group)
        unknown = tensors.keys() - group.targets.keys()
        if unknown:
            raise UnsupportedModelError(
                f"the result would need a tensor {sorted(unknown)[0]!r} that the source lacks.", hint=REPORT_HINT
            )
        for name, tensor in tensors.items():
            account.add(model.tensors[name], tuple(tensor.shape))
        for name, tensor in model.skeleton.to_stored({name: result[name] for name in factors}, group).items():
            dtype = model.dtype if tensor.is_floating_point() else tensor.dtype
            account.outputs.append((name, dtype, tuple(tensor.shape)))
        for name, target in group.targets.items():
            if target not in changed:
                account.keep(model.tensors[name])
    for name in account.unread:
        account.keep(model.tensors[name])
    return account
