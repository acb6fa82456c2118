"""Finds the logical tensors of a checkpoint from its config and its headers."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from hcsmoe_hub.checkpoint.formats.carried import CarriedPart, stored_key
from hcsmoe_hub.checkpoint.formats.grid import Grid
from hcsmoe_hub.checkpoint.formats.logical import Codec, LogicalTensor
from hcsmoe_hub.checkpoint.formats.mxfp4 import BLOCK, Mxfp4Blocks, Mxfp4Rows
from hcsmoe_hub.checkpoint.formats.packed import PackedCodec
from hcsmoe_hub.checkpoint.formats.refusals import refuse_foreign, unexplained
from hcsmoe_hub.checkpoint.formats.scaled import ScaledCodec
from hcsmoe_hub.checkpoint.formats.scales import EXPONENTS
from hcsmoe_hub.checkpoint.formats.settings import QuantizationSettings
from hcsmoe_hub.checkpoint.tensors import StoredTensor
from hcsmoe_hub.errors import SourceError

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
BYTES = (torch.int8, torch.uint8)
# How checkpoints name the scales of a weight, and the static scales of its inputs.
SCALE_KEYS = ("{name}_scale_inv", "{name}_scale", "{module}scale", "{module}qscale_weight")
ACTIVATION_KEYS = ("{module}input_scale", "{module}activation_scale", "{module}qscale_act", "{name}_activation_scale")

_BLOCKS, _PACKED = "_blocks", "_packed"


def logical_tensors(config: Mapping[str, Any], stored: Mapping[str, StoredTensor]) -> dict[str, LogicalTensor]:
    """What a model sees of the stored tensors; only their headers are needed.

    What is stored decides, not the config: a quantisation config that is left over from another checkpoint is
    ignored, and tensors that a config excludes are plain because they are stored as plain numbers.

    Args:
        config: Raw ``config.json``.
        stored: Every stored tensor by key.

    Returns:
        Logical tensors by key, in the order of the stored ones; every stored tensor is a part of exactly one.

    Raises:
        UnsupportedModelError: If weights are in a format that cannot be decoded.
        SourceError: If scales do not fit the shape of their weight.
    """
    settings = QuantizationSettings.of(config)
    refuse_foreign(settings, stored)
    coded: dict[str, LogicalTensor] = {}
    for tensor in stored.values():
        found = _decoded(tensor, settings, stored)
        if found is not None:
            name, shape, codec = found
            coded[tensor.name] = _assemble(name, shape, codec, stored)
    parts = {part.name for logical in coded.values() for part in logical.parts.values()}
    result = {}
    for key, tensor in stored.items():
        if key in coded:
            result[coded[key].name] = coded[key]
        elif key not in parts:
            result[key] = LogicalTensor(
                name=key, shape=tensor.shape, dtype=tensor.dtype, parts={"": tensor}, codec=None
            )
    return result


_Found = tuple[str, tuple[int, ...], Codec]


def _decoded(tensor: StoredTensor, settings: QuantizationSettings, stored: Mapping[str, StoredTensor]) -> _Found | None:
    """Name, shape and codec of the logical tensor whose codes a stored one holds; ``None`` if it holds no codes."""
    if tensor.dtype in FP8:
        return _scaled(tensor, settings, stored)
    if tensor.dtype == torch.uint8 and tensor.name.endswith(_BLOCKS):
        return _mxfp4_blocks(tensor, settings, stored)
    if tensor.dtype == torch.int32 and tensor.name.endswith(_PACKED):
        return _packed(tensor, settings, stored)
    if tensor.dtype in BYTES and tensor.name.endswith(("weight", "_proj")) and len(tensor.shape) > 1:
        found = _mxfp4_rows(tensor, settings, stored)
        if found is None and tensor.dtype == torch.int8 and settings.method == "compressed-tensors":
            return _scaled(tensor, settings, stored)
        if found is None:
            raise unexplained(tensor, settings)
        return found
    return None


def _scaled(tensor: StoredTensor, settings: QuantizationSettings, stored: Mapping[str, StoredTensor]) -> _Found:
    """FP8 or INT8 codes with one of the many kinds of scales."""
    scales = next(_named(SCALE_KEYS, tensor, stored), None)
    is_symmetric = f"{tensor.name}_zero_point" not in stored
    if scales is None or not is_symmetric or len(tensor.shape) not in (2, 3):
        raise unexplained(tensor, settings)
    template, scale = scales
    rows, columns = settings.block_sizes
    # Blocks of exponents are those of the OCP formats, whatever other weights have.
    if scale.dtype in EXPONENTS:
        columns = [*columns, BLOCK]
    grid = Grid.between(tensor.shape, scale.shape, [rows, columns])
    if grid is None:
        known = " or ".join(f"{height} x {width}" for height, width in zip(rows, columns, strict=False))
        raise _misfit(tensor, scale, f"blocks of {known or 'any size that the config names'}")
    codec = ScaledCodec(
        code=tensor.dtype,
        grid=grid,
        scale=scale.dtype,
        scale_key=template,
        powers=settings.powers,
        dtype=settings.dtype,
        extra=tuple(_carried(tensor, stored)),
    )
    return tensor.name, tensor.shape, codec


def _carried(tensor: StoredTensor, stored: Mapping[str, StoredTensor]) -> Iterator[CarriedPart]:
    """Static scales of activations that belong to a weight."""
    for template, part in _named(ACTIVATION_KEYS, tensor, stored):
        is_per_expert = len(tensor.shape) == 3 and part.shape[:1] == tensor.shape[:1]
        shape = part.shape[1:] if is_per_expert else part.shape
        role = template.rpartition("}")[2].strip("_")
        yield CarriedPart(role=role, key=template, dtype=part.dtype, shape=shape, is_per_expert=is_per_expert)


def _named(
    templates: tuple[str, ...], tensor: StoredTensor, stored: Mapping[str, StoredTensor]
) -> Iterator[tuple[str, StoredTensor]]:
    """The stored tensors next to a weight that have some of the usual names."""
    for template in templates:
        # A module's only scale belongs to its weight, not to what else it may hold.
        if template.startswith("{module}") and not tensor.name.endswith("weight"):
            continue
        found = stored.get(stored_key(template, tensor.name))
        if found is not None:
            yield template, found


def _mxfp4_blocks(tensor: StoredTensor, settings: QuantizationSettings, stored: Mapping[str, StoredTensor]) -> _Found:
    name = tensor.name.removesuffix(_BLOCKS)
    scale = stored.get(f"{name}_scales")
    if scale is None or scale.dtype != torch.uint8 or len(tensor.shape) != 4 or tensor.shape[-1] != BLOCK // 2:
        raise unexplained(tensor, settings)
    if scale.shape != tensor.shape[:-1]:
        raise _misfit(tensor, scale, f"blocks of {BLOCK} numbers")
    experts, rows, groups, _ = tensor.shape
    return name, (experts, groups * BLOCK, rows), Mxfp4Blocks(dtype=settings.dtype)


def _mxfp4_rows(
    tensor: StoredTensor, settings: QuantizationSettings, stored: Mapping[str, StoredTensor]
) -> _Found | None:
    scales = next(_named(SCALE_KEYS, tensor, stored), None)
    if scales is None or scales[1].dtype not in EXPONENTS:
        return None
    template, scale = scales
    *rows, packed = tensor.shape
    if scale.shape != (*rows, packed * 2 // BLOCK) or packed * 2 % BLOCK:
        raise _misfit(tensor, scale, f"two codes to a byte and blocks of {BLOCK} numbers")
    codec = Mxfp4Rows(code=tensor.dtype, scale=scale.dtype, scale_key=template, dtype=settings.dtype)
    return tensor.name, (*rows, packed * 2), codec


def _packed(tensor: StoredTensor, settings: QuantizationSettings, stored: Mapping[str, StoredTensor]) -> _Found:
    name = tensor.name.removesuffix(_PACKED)
    scale, size = stored.get(f"{name}_scale"), stored.get(f"{name}_shape")
    if scale is None or size is None or len(tensor.shape) != 2 or len(scale.shape) != 2:
        raise unexplained(tensor, settings)
    zero_points = stored.get(f"{name}_zero_point")
    for weights in settings.weights():
        bits, group = weights.get("num_bits"), weights.get("group_size")
        if bits not in (4, 8):
            continue
        rows, columns = tensor.shape[0], tensor.shape[1] * 32 // bits
        if isinstance(group, int) and group > 0:
            # The last word may be a partial one; groups are always whole.
            columns = min(columns, scale.shape[1] * group)
        grid = Grid.between((rows, columns), scale.shape, [[], [group] if isinstance(group, int) else []])
        codec = grid and PackedCodec(
            bits=bits,
            grid=grid,
            scale=scale.dtype,
            size=size.dtype,
            has_zero_points=zero_points is not None,
            dtype=settings.dtype,
        )
        if codec and codec.part_specs((rows, columns))["weight"][1] == tensor.shape:
            return name, (rows, columns), codec
    described = [(weights.get("num_bits"), weights.get("group_size")) for weights in settings.weights()]
    raise _misfit(tensor, scale, f"bits and group sizes {described}")


def _assemble(name: str, shape: tuple[int, ...], codec: Codec, stored: Mapping[str, StoredTensor]) -> LogicalTensor:
    """A logical tensor of parts that are all as its codec stores them."""
    specs = codec.part_specs(shape)
    parts = {role: stored[key] for role, key in codec.part_names(name).items()}
    for role, part in parts.items():
        if (part.dtype, part.shape) != specs[role]:
            dtype, expected = specs[role]
            raise SourceError(
                f"tensor {part.name!r} in {part.shard} has {part.dtype} and the shape {list(part.shape)}; "
                f"a weight of shape {list(shape)} needs {dtype} and the shape {list(expected)}.",
                hint="download the checkpoint again",
            )
    return LogicalTensor(name=name, shape=shape, dtype=codec.dtype, parts=parts, codec=codec)


def _misfit(tensor: StoredTensor, scale: StoredTensor, blocks: str) -> SourceError:
    return SourceError(
        f"tensor {tensor.name!r} has the shape {list(tensor.shape)}, and its scales {scale.name!r} have the shape "
        f"{list(scale.shape)}, which does not fit {blocks}.",
        hint="compare quantization_config in config.json with the publisher's, or download the checkpoint again",
    )
