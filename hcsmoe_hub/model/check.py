"""Checks that the stored tensors are those that the config describes."""

from collections.abc import Mapping

from hcsmoe_hub.checkpoint.formats import LogicalTensor
from hcsmoe_hub.errors import SourceError
from hcsmoe_hub.model.skeleton import Group, Placement, Skeleton


def check_against_config(skeleton: Skeleton, placement: Placement, tensors: Mapping[str, LogicalTensor]) -> None:
    """Checks that the stored tensors are those that the config describes.

    Raises:
        SourceError: If a tensor is missing or has another shape than the config says.
    """
    hint = "config.json and the weights do not belong together, or the download is incomplete"
    for layer, group in placement.groups.items():
        if problem := _problem(skeleton, layer, group, tensors):
            raise SourceError(problem, hint=hint)
    groups = placement.groups.values()
    loaded = {target for group in groups for target in (*group.targets.values(), *group.further)}
    missing = skeleton.state.keys() - skeleton.aside - loaded - skeleton.module.all_tied_weights_keys.keys()
    if missing:
        raise SourceError(f"the checkpoint lacks the tensor for {sorted(missing)[0]!r}.", hint=hint)


def mtp_problem(skeleton: Skeleton, placement: Placement, tensors: Mapping[str, LogicalTensor]) -> str | None:
    """Why the stored tensors of a skeleton's MTP head are not those of a decoder layer; ``None`` if they are."""
    head = skeleton.mtp
    assert head is not None, "the skeleton has a head"
    if strangers := sorted(head.keys.intersection(placement.unused) - head.copies):
        return f"but tensor {strangers[0]!r} is not part of a decoder layer"
    group = placement.groups[head.layer]
    parameters = {name for name in skeleton.state if skeleton.layer_of(name) == head.layer}
    if missing := sorted(parameters - set(group.targets.values())):
        return f"but the tensor for {missing[0]!r} is missing"
    found = _problem(skeleton, head.layer, group, tensors)
    return None if found is None else f"but {found.removesuffix('.')}"


def _problem(skeleton: Skeleton, layer: int | None, group: Group, tensors: Mapping[str, LogicalTensor]) -> str | None:
    """What is wrong with the stored tensors of one group; ``None`` if nothing."""
    described = skeleton.to_stored(
        {name: skeleton.state[name] for name in {*group.targets.values(), *group.further}}, group
    )
    for name in sorted(described, key=_natural):
        tensor, found = described[name], tensors.get(name)
        if found is None or found.shape != tuple(tensor.shape):
            where = "outside the layers" if layer is None else f"of layer {layer}"
            has = "is missing" if found is None else f"has the shape {list(found.shape)} in {_shard(found)}"
            return f"tensor {name!r} {where} {has}; config.json describes {list(tensor.shape)}."
    extra = group.targets.keys() - described.keys()
    return f"tensor {sorted(extra)[0]!r} is more than config.json describes." if extra else None


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts numbers in names by value, so that the first of several missing experts is the one that is named."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def _shard(tensor: LogicalTensor) -> str:
    return next(iter(tensor.parts.values())).shard
