"""Rounds the experts of the result to the format in which the source stores its own."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hcsmoe_hub.checkpoint.formats import Codec, LogicalTensor
from hcsmoe_hub.checkpoint.formats.logical import WEIGHT
from hcsmoe_hub.checkpoint.formats.mxfp4 import BLOCK, Mxfp4Blocks, Mxfp4Rows
from hcsmoe_hub.errors import VerificationError
from hcsmoe_hub.layer.context import LayerContext
from hcsmoe_hub.model.skeleton import Group, Skeleton
from hcsmoe_hub.model.transformers_seam import load_weights

Parts = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Heritage:
    """Where the experts of the result come from.

    Attributes:
        origins: Expert of the source that each one of the result follows.
        members: Experts of the source that each one stands for.
    """

    origins: Sequence[int]
    members: Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rounded:
    """Experts of the result as they are stored.

    Attributes:
        tensors: What a reader of the result will see, by parameter name.
        parts: What is written, by stored name.
    """

    tensors: dict[str, Tensor]
    parts: dict[str, Tensor]


class StoredExperts:
    """Encodes the experts of one layer after another as the source does, once, and keeps that until it is written.

    Args:
        tensors: Stored tensors of the source as the model sees them, by name.
        groups: Where they belong, by decoder layer.
        experts: Parameters that hold experts.
    """

    def __init__(
        self, tensors: Mapping[str, LogicalTensor], groups: Mapping[int | None, Group], experts: frozenset[str]
    ) -> None:
        self._tensors = tensors
        self._groups = groups
        targets = ((name, target) for group in groups.values() for name, target in group.targets.items())
        self._names = {
            name: target for name, target in targets if target in experts and tensors[name].codec is not None
        }
        self._parameters = set(self._names.values())
        self._scales: dict[str, dict[str, Tensor]] = {}
        self._kept: dict[int | None, dict[str, Tensor]] = {}

    def remember(self, tensor: LogicalTensor, parts: Parts) -> None:
        """Keeps the scales of an expert of the source until its layer is converted.

        Args:
            tensor: What was read.
            parts: Its parts as stored, by role.
        """
        if tensor.name in self._names:
            self._scales[tensor.name] = {role: part for role, part in parts.items() if role != WEIGHT}

    def holds(self, parameter: str) -> bool:
        """Whether a parameter is written from here, because its experts are stored as several parts."""
        return parameter in self._parameters

    def take(self, layer: int | None) -> dict[str, Tensor]:
        """What is to be written of a layer's experts, by stored name; it is not kept any longer."""
        if layer not in self._kept:
            return {}
        for name in self._scales.keys() & self._groups[layer].targets.keys():
            del self._scales[name]
        return self._kept.pop(layer)

    def keep(self, layer: int, rounded: Rounded) -> None:
        """Keeps the experts of a layer until they are written."""
        self._kept[layer] = rounded.parts

    def piece(self, parameter: str) -> int | None:
        """Length of the blocks that rounding leaves as they are once they are rounded; ``None`` without such blocks."""
        codecs = [self._tensors[name].codec for name, target in self._names.items() if target == parameter]
        is_mxfp4 = all(isinstance(codec, Mxfp4Blocks | Mxfp4Rows) for codec in codecs)
        return BLOCK if codecs and is_mxfp4 else None

    def round(self, layer: LayerContext, changed: Mapping[str, Tensor], heritage: Heritage) -> Rounded:
        """Encodes the experts of a layer, and decodes them again.

        An expert that can be stored with the very scales of the one that it follows keeps them, and with them the bytes
        of all that did not change.

        Args:
            layer: The layer.
            changed: Tensors of its block in the result, by parameter name.
            heritage: Where its experts come from.

        Returns:
            Those of them that hold experts in a format of several parts.

        Raises:
            VerificationError: If transformers does not put together what it took apart.
        """
        number, skeleton = layer.block.layer, layer.source.skeleton
        group = self._groups[number]
        names = self._parameters & changed.keys()
        if not names:
            return Rounded(tensors={}, parts={})
        stored = skeleton.to_stored({name: changed[name] for name in names}, group)
        places = expert_places([name for name in group.targets if group.targets[name] in names])
        encoded: dict[str, Tensor] = {}
        lazy: dict[str, _Decoded | Tensor] = {}
        for name in list(stored):
            values, tensor = stored.pop(name), self._tensors[name]
            if tensor.codec is None:
                encoded[name] = lazy[name] = values
                continue
            parts = self._encode(tensor, tensor.codec, values, places, heritage)
            encoded |= {key: parts[role] for role, key in tensor.codec.part_names(name).items()}
            lazy[name] = _Decoded(tensor.codec, parts)
        tensors = _joined(skeleton, lazy, {name: changed[name] for name in names})
        return Rounded(tensors=tensors, parts=encoded)

    def _encode(
        self,
        tensor: LogicalTensor,
        codec: Codec,
        values: Tensor,
        places: Mapping[str, tuple[str, int]],
        heritage: Heritage,
    ) -> dict[str, Tensor]:
        """The parts of one tensor of the result."""
        if tensor.name not in places:
            return self._encode_fused(tensor, codec, values, heritage)
        template, expert = places[tensor.name]
        origin = template.format(heritage.origins[expert])
        scales = self._scales[origin]
        if self._tensors[origin].codec == codec and _fit(scales, codec, values):
            again = codec.encode_as(values, _on(values, scales))
            if torch.equal(codec.decode(again), values):
                return {**again, **{role: scales[role] for role in codec.carried}}
        members = [self._scales[template.format(member)] for member in heritage.members[expert]]
        # Activations of all members reach the expert that stands for them.
        widest = {role: torch.stack([member[role] for member in members]).amax(0) for role in codec.carried}
        return {**codec.encode(values), **widest}

    def _encode_fused(
        self, tensor: LogicalTensor, codec: Codec, values: Tensor, heritage: Heritage
    ) -> dict[str, Tensor]:
        """The parts of a tensor that holds all experts ``[E, ...]``."""
        experts, scales, origins = tensor.shape[0], self._scales[tensor.name], list(heritage.origins)
        own = {role: part[origins] if part.shape[:1] == (experts,) else part for role, part in scales.items()}
        if len(values) != len(origins):
            return codec.encode(values)
        carried = {role: own[role] for role in codec.carried}
        if not _fit(own, codec, values):
            return {**codec.encode(values), **carried}
        again = codec.encode_as(values, _on(values, own))
        is_same = (codec.decode(again) == values).flatten(1).all(1)
        if is_same.all():
            return {**again, **carried}
        parts = codec.encode(values)
        # Where all experts share a scale, none can keep the old one alone.
        if all(part.shape[:1] == (len(origins),) for part in parts.values()):
            for role, part in parts.items():
                part[is_same] = again[role][is_same]
        return {**parts, **carried}


class _Decoded:
    """A tensor that is decoded when transformers' loader asks for it."""

    def __init__(self, codec: Codec, parts: Parts) -> None:
        self._codec = codec
        self._parts = parts

    def __getitem__(self, index: object) -> Tensor:
        assert index is Ellipsis, "transformers reads whole tensors"
        return self._codec.decode(self._parts)


def expert_places(names: Sequence[str]) -> dict[str, tuple[str, int]]:
    """Finds the number of the expert in stored names that each belong to one.

    Args:
        names: Stored names of the experts of one layer.

    Returns:
        Name to its form with a place for the number (``experts.{}.w1.weight``), and the number. Names of tensors that
        hold all experts are not in it.
    """
    pieces = [name.split(".") for name in names]
    numbers: dict[int, set[str]] = {}
    for piece in pieces:
        for position, word in enumerate(piece):
            if word.isdecimal():
                numbers.setdefault(position, set()).add(word)
    varying = [position for position, words in numbers.items() if len(words) > 1]
    if not varying:
        return {}
    at = max(varying, key=lambda position: len(numbers[position]))
    return {
        name: (".".join([*piece[:at], "{}", *piece[at + 1 :]]), int(piece[at]))
        for name, piece in zip(names, pieces, strict=True)
    }


def _fit(scales: Parts, codec: Codec, values: Tensor) -> bool:
    """Whether scales of the source have the shapes that those of ``values`` have; narrower experts have fewer."""
    specs = codec.part_specs(tuple(values.shape))
    return all(part.shape == specs[role][1] for role, part in scales.items() if role not in codec.carried)


def _on(values: Tensor, parts: Parts) -> dict[str, Tensor]:
    return {role: part.to(values.device) for role, part in parts.items()}


def _joined(
    skeleton: Skeleton, lazy: dict[str, "_Decoded | Tensor"], changed: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Stored tensors to parameters, as loading the result would make them."""
    device = next(iter(changed.values())).device
    with _making_room(skeleton.module, changed):
        named = {skeleton.in_model(name): tensor for name, tensor in lazy.items()}
        problems = load_weights(skeleton.module, named, skeleton.dtype, device=device)
        state = skeleton.module.state_dict()
        found = {name: state[name] for name in changed}
    unplaced = [name for name, tensor in found.items() if tensor.is_meta]
    if problems or unplaced:
        raise VerificationError(
            f"transformers cannot load what it should store as {next(iter(lazy))!r}: {[*problems, *unplaced][0]}.",
            hint="use `dtype='bfloat16'`",
        )
    return found


@contextmanager
def _making_room(module: nn.Module, changed: Mapping[str, Tensor]) -> Iterator[None]:
    """Replaces parameters by empty ones of other shapes for a while."""
    places = {name: (module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in changed}
    before = {name: owner._parameters[attribute] for name, (owner, attribute) in places.items()}
    try:
        for name, (owner, attribute) in places.items():
            empty = torch.empty_like(changed[name], device="meta")
            owner._parameters[attribute] = nn.Parameter(empty, requires_grad=False)
        yield
    finally:
        for name, (owner, attribute) in places.items():
            owner._parameters[attribute] = before[name]
