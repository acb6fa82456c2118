"""Which parameters are filled tensor by tensor, each read to its own place, and where that is.

transformers reads all parts of a parameter, stacks them, and joins the stacks: three times the memory, and two copies
of every byte. Experts that are only stacked and joined need none of that.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from hcsmoe_hub.checkpoint.formats import LogicalTensor
from hcsmoe_hub.model.skeleton import Group, Skeleton
from hcsmoe_hub.model.transformers_seam import has_dtype_of_its_own, order_of_experts


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a stored tensor lies in its parameter.

    Attributes:
        name: The stored tensor.
        expert: Number of the expert; ``None`` if the tensor is the whole parameter.
        start: First row among those of the expert.
        end: The row after the last one.
    """

    name: str
    expert: int | None = None
    start: int = 0
    end: int = 0

    def within(self, parameter: Tensor) -> Tensor:
        """The part of a parameter ``[E, rows, ...]`` that the tensor fills."""
        return parameter if self.expert is None else parameter[self.expert, self.start : self.end]


@dataclass(frozen=True, slots=True, kw_only=True)
class Filled:
    """A parameter that is filled in place.

    Attributes:
        dtype: Its dtype in memory.
        places: Where its stored tensors lie in it, in the order of the files.
    """

    dtype: torch.dtype
    places: tuple[Place, ...]


def filled_parameters(
    skeleton: Skeleton, group: Group, tensors: Mapping[str, LogicalTensor], *, as_stored: Set[str]
) -> dict[str, Filled]:
    """The parameters of a group that need no conversion but stacking.

    Args:
        skeleton: The model.
        group: What belongs to one of its layers.
        tensors: All stored tensors, by name.
        as_stored: Parameters that keep the dtype of their stored tensors, and are filled in place if they are stored
            as a whole.

    Returns:
        How each is filled, by name.
    """
    names: defaultdict[str, list[str]] = defaultdict(list)
    for name, parameter in group.targets.items():
        names[parameter].append(name)
    found = {}
    for parameter, stored in names.items():
        if has_dtype_of_its_own(skeleton.module, parameter, skeleton.dtype):
            continue
        own = {name: tensors[name] for name in stored}
        places = _whole(own, group, skeleton.state[parameter]) if parameter in as_stored else None
        places = places or _stacked(own, group, skeleton.state[parameter])
        dtypes = {tensor.dtype for tensor in own.values()}
        if places is None or len(dtypes) > 1:
            continue
        dtype = dtypes.pop() if parameter in as_stored else skeleton.state[parameter].dtype
        found[parameter] = Filled(
            dtype=dtype, places=tuple(sorted(places, key=lambda place: _position(own[place.name])))
        )
    return found


def _whole(own: Mapping[str, LogicalTensor], group: Group, parameter: Tensor) -> list[Place] | None:
    """The place of a tensor that is only renamed."""
    (name, tensor), *others = own.items()
    is_whole = not others and name in group.renamed and tensor.shape == parameter.shape
    return [Place(name=name)] if is_whole else None


def _stacked(own: Mapping[str, LogicalTensor], group: Group, parameter: Tensor) -> list[Place] | None:
    """Places of tensors of one expert each; ``None`` if these are anything else, or do not fill the parameter."""
    parts: defaultdict[int, list[str]] = defaultdict(list)
    for name in order_of_experts(own):
        if name not in group.stacked:
            return None
        parts[group.stacked[name]].append(name)
    places, start = [], 0
    for part in sorted(parts):
        shape = own[parts[part][0]].shape
        if len(parts[part]) != len(parameter) or any(own[name].shape != shape for name in parts[part]):
            return None
        if not shape or (len(parts) > 1 and shape[1:] != parameter.shape[2:]):
            return None
        end = start + shape[0]
        places += [Place(name=name, expert=expert, start=start, end=end) for expert, name in enumerate(parts[part])]
        start = end
    is_full = parameter.dim() > 1 and start == parameter.shape[1]
    is_full = is_full and sum(math.prod(tensor.shape) for tensor in own.values()) == parameter.numel()
    return places if is_full else None


def _position(tensor: LogicalTensor) -> tuple[str, int]:
    """Where the first byte of a tensor is."""
    return min((part.shard, part.offset) for part in tensor.parts.values())
