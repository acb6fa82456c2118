"""What a source model is: its experts, its blocks, and how its stored tensors fit; from config and headers alone."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from hcsmoe_hub.checkpoint import config_json
from hcsmoe_hub.checkpoint.config_json import MoESettings, plain_config
from hcsmoe_hub.checkpoint.formats import LogicalTensor, logical_tensors
from hcsmoe_hub.checkpoint.modeling_hcsmoe import read_expert_map
from hcsmoe_hub.checkpoint.modeling_hcsmoe_factored import FactorSizes, read_sizes
from hcsmoe_hub.checkpoint.source import Source
from hcsmoe_hub.errors import SourceError, UnsupportedModelError
from hcsmoe_hub.model.architectures import ARCHITECTURES, Architecture
from hcsmoe_hub.model.blocks import MoEBlock, compare, find_blocks
from hcsmoe_hub.model.check import check_against_config, mtp_problem
from hcsmoe_hub.model.model_class import build_config
from hcsmoe_hub.model.mtp import find_head, is_mtp_key
from hcsmoe_hub.model.raw_config import check_stored, translated_errors
from hcsmoe_hub.model.skeleton import Group, Placement, Skeleton


@dataclass(slots=True, kw_only=True)
class SourceModel:
    """A source model as its config and headers describe it.

    Attributes:
        source: Where it comes from.
        settings: Its expert counts.
        tensors: What is stored, as the model sees it, by name.
        skeleton: The model without weights, in the dtype that it is computed in.
        dtype: Dtype of most of its weights once they are decoded, and of those of a result.
        placement: Where these belong in it.
        blocks: Its MoE blocks, one per sparse layer.
        expert_map: Decoder layer to the expert of each router row, if it is a result in the mapped layout.
        factors: Sizes of the factors of its experts, if it is a result in the factored layout.
        mtp_problem: Why the MTP head cannot be treated as a decoder layer, although its arithmetic is known.
    """

    source: Source
    settings: MoESettings
    tensors: Mapping[str, LogicalTensor]
    skeleton: Skeleton
    dtype: torch.dtype
    placement: Placement
    blocks: tuple[MoEBlock, ...]
    expert_map: Mapping[int, tuple[int, ...]] | None = None
    factors: FactorSizes | None = None
    mtp_problem: str | None = None

    @property
    def decoder_blocks(self) -> tuple[MoEBlock, ...]:
        """Its MoE blocks without that of an MTP head."""
        return tuple(block for block in self.blocks if block.layer < self.skeleton.depth)

    @property
    def layer_counts(self) -> dict[str, int]:
        """``moe_layers`` of the decoder and, if an MTP head is treated like them, ``mtp_layers``."""
        heads = len(self.blocks) - len(self.decoder_blocks)
        return {"moe_layers": len(self.decoder_blocks)} | ({"mtp_layers": heads} if heads else {})

    @property
    def parameters(self) -> int:
        """Parameters of all that is stored, shared ones counted once."""
        return self.count(self.skeleton.state, self.placement.unused)

    def count(self, state: Mapping[str, Tensor], others: Iterable[str]) -> int:
        """Parameters of a state, shared ones counted once, and of stored tensors that the model does not load.

        Args:
            state: Tensors of the model, with any number of experts.
            others: Names of the stored tensors.
        """
        shared = self.skeleton.module.all_tied_weights_keys.keys()
        loaded = sum(tensor.numel() for name, tensor in state.items() if name not in shared)
        return loaded + sum(math.prod(self.tensors[name].shape) for name in others)

    @property
    def mtp_keys(self) -> list[str]:
        """Stored names of MTP heads that the model does not load."""
        names = (name for layer, group in self.groups.items() if layer is not None for name in group.targets)
        stacks = {match.group(1) for name in names if (match := re.match(r"(.*?\.)\d+\.", name))}
        return [name for name in self.placement.unused if is_mtp_key(name, stacks, self.skeleton.depth)]

    @property
    def not_loaded(self) -> set[str]:
        """Names of what transformers does not load with the model, stored or in memory: other parts, an MTP head."""
        skeleton = self.skeleton
        if skeleton.mtp is None:
            return set(self.placement.unused)
        own = {name for name in skeleton.state if skeleton.layer_of(name) == skeleton.mtp.layer}
        return own.union(self.placement.unused, skeleton.mtp.keys)

    @property
    def architecture(self) -> Architecture:
        """Its family."""
        found = find_architecture(self.skeleton.config)
        assert found is not None, "other families are refused"
        return found

    @property
    def groups(self) -> Mapping[int | None, Group]:
        """What text runs through, by decoder layer; ``None`` is everything outside the layers."""
        return self.placement.groups

    @property
    def stored_keys(self) -> dict[int | None, list[str]]:
        """Stored tensors that text runs through, by decoder layer; ``None`` is everything outside the layers."""
        return {layer: self.parts_of(group.targets) for layer, group in self.groups.items()}

    @property
    def is_quantized(self) -> bool:
        """Whether any tensor is stored in a quantised format."""
        return any(tensor.codec is not None for tensor in self.tensors.values())

    def parts_of(self, names: Iterable[str]) -> list[str]:
        """Names of the stored tensors that some tensors are made of."""
        return [part.name for name in names for part in self.tensors[name].parts.values()]

    def expert_parameters(self) -> int:
        """Parameters of all routed experts, those of an MTP head included."""
        state = self.skeleton.state
        return sum(state[tensor.name].numel() for block in self.blocks for tensor in block.experts)


def read_model(source: Source, *, with_mtp: bool = True, compute: torch.dtype = torch.bfloat16) -> SourceModel:
    """Describes a source from its config and headers.

    Args:
        source: The source.
        with_mtp: Whether its MTP head is treated as a decoder layer, as far as its arithmetic is known.
        compute: Dtype in which bfloat16 weights are computed with; other weights are in their own.

    Raises:
        SourceError: If files are missing or damaged, or contradict each other.
        UnsupportedModelError: If the model cannot be converted.
    """
    with translated_errors(source.label):
        built = build_config(source.config)
    _check_architecture(built, source)
    settings = config_json.read_settings(built)
    config_json.check_aliases(source.config, settings)
    _check_plausible(source, settings)
    check_stored(source.config, source.tensors, label=source.label)
    stored = logical_tensors(source.config, source.tensors)
    own_dtype = _main_dtype(source, stored)
    dtype = compute if own_dtype == torch.bfloat16 else own_dtype
    with translated_errors(source.label):
        # Layouts with a modelling file are of the decoder only.
        is_plain = read_sizes(built) is None and read_expert_map(built) is None
        head = find_head(stored, built) if with_mtp and is_plain else None
        skeleton = Skeleton(source.config, dtype, mtp=head)
    placement = skeleton.place(stored)
    problem = None if head is None else mtp_problem(skeleton, placement, stored)
    if problem is not None:
        head, skeleton = None, Skeleton(source.config, dtype)
        placement = skeleton.place(stored)
    check_against_config(skeleton, placement, stored)
    # A map leads from N router rows; without it, the same config describes the N experts that they had.
    plain = plain_config(source.config)
    untied = skeleton if skeleton.expert_map is None else Skeleton(plain, dtype, mtp=head)
    # The sizes of factors do not depend on the number of experts.
    config = plain if skeleton.factors is None else source.config
    twice = _with_experts(config, built, settings, 2 * settings.experts)
    tensors = compare(untied.state, Skeleton(twice, dtype, mtp=head).state, experts=settings.experts)
    blocks = find_blocks(skeleton.layers_by_path, tensors, skeleton.state)
    if not blocks:
        raise UnsupportedModelError(
            f"{source.label} has no MoE layer, so there are no experts to merge or prune.",
            hint="pass a Mixture-of-Experts checkpoint; see 'hcsmoe architectures'",
        )
    model = SourceModel(
        source=source,
        settings=settings,
        tensors=stored,
        skeleton=skeleton,
        dtype=own_dtype,
        placement=placement,
        blocks=blocks,
        expert_map=skeleton.expert_map,
        factors=skeleton.factors,
        mtp_problem=problem,
    )
    _check_expert_dtypes(model)
    return model


def _check_plausible(source: Source, settings: MoESettings) -> None:
    """Checks that there is room for the experts in what is stored, before a model of that size is built.

    Raises:
        SourceError: If neither the number of tensors nor any of their sizes reaches the number of experts.
    """
    largest = max((size for tensor in source.tensors.values() for size in tensor.shape), default=0)
    if settings.experts > max(len(source.tensors), largest):
        raise SourceError(
            f"config.json of {source.label} declares {settings.experts} experts, but {len(source.tensors)} tensors "
            f"are all that is stored, the longest with {largest} rows.",
            hint="config.json and the weights do not belong together",
        )


def find_architecture(config: PreTrainedConfig) -> Architecture | None:
    """The family of a model, under its own type or that of its text model; ``None`` if it is not listed."""
    return ARCHITECTURES.get(config.model_type) or ARCHITECTURES.get(config.get_text_config().model_type)


def _check_architecture(built: PreTrainedConfig, source: Source) -> None:
    """Checks that the family of a model is supported, under its own type or that of its text model."""
    own, architecture = built.model_type, find_architecture(built)
    supported = "see 'hcsmoe architectures' for what is supported"
    if architecture is None:
        settings = config_json.has_expert_count(source.config)
        kind = "is not supported" if settings else "is a dense model: its config names no experts to merge"
        raise UnsupportedModelError(f"{source.label} has model_type {own!r}, which {kind}.", hint=supported)
    if architecture.refusal:
        raise UnsupportedModelError(
            f"{source.label} has model_type {own!r}, which is refused: {architecture.refusal}.", hint=supported
        )


def _main_dtype(source: Source, tensors: Mapping[str, LogicalTensor]) -> torch.dtype:
    """The dtype of most of the weights, once they are decoded."""
    sizes: Counter[torch.dtype] = Counter()
    for tensor in tensors.values():
        if tensor.dtype.is_floating_point:
            sizes[tensor.dtype] += math.prod(tensor.shape) * tensor.dtype.itemsize
    if not sizes:
        raise UnsupportedModelError(
            f"{source.label} stores no floating-point weights.",
            hint="convert the unquantised checkpoint of the same model",
        )
    dtype = max(sizes, key=lambda dtype: sizes[dtype])
    if dtype.itemsize < 2:
        raise UnsupportedModelError(
            f"{source.label} stores {dtype} weights without a quantization_config that says how to read them.",
            hint="convert the unquantised checkpoint of the same model",
        )
    return dtype


def _check_expert_dtypes(model: SourceModel) -> None:
    experts = {tensor.name for block in model.blocks for tensor in block.experts}
    for group in model.groups.values():
        for name, target in group.targets.items():
            dtype = model.tensors[name].dtype
            # Factors come with numbers of rows, which are whole ones.
            if target in experts and dtype.is_floating_point and dtype != model.dtype:
                raise UnsupportedModelError(
                    f"expert tensor {name!r} is stored as {dtype}, most weights as {model.dtype}: "
                    "experts of mixed precision cannot be merged without loss.",
                    hint="save the checkpoint in one dtype first",
                )


def _with_experts(config: Mapping[str, Any], built: Any, settings: MoESettings, experts: int) -> dict[str, Any]:
    after = MoESettings(
        experts=experts,
        experts_per_token=settings.experts_per_token,
        groups=settings.groups,
        groups_per_token=settings.groups_per_token,
    )
    return config_json.edit(config, built, settings, after)
