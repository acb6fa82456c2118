"""What a source model is: its experts, its blocks, and how its stored tensors fit; from config and headers alone."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from hcsmoe_hub.checkpoint import config_json
from hcsmoe_hub.checkpoint.config_json import MoESettings, plain_config
from hcsmoe_hub.checkpoint.source import Source
from hcsmoe_hub.errors import SourceError, UnsupportedModelError
from hcsmoe_hub.model.architectures import ARCHITECTURES
from hcsmoe_hub.model.blocks import MoEBlock, compare, find_blocks
from hcsmoe_hub.model.check import check_against_config
from hcsmoe_hub.model.skeleton import Group, Skeleton, build_config, quantization_method


@dataclass(slots=True, kw_only=True)
class SourceModel:
    """A source model as its config and headers describe it.

    Attributes:
        source: Where it comes from.
        settings: Its expert counts.
        skeleton: The model without weights.
        groups: Stored keys by decoder layer; ``None`` is everything outside the layers.
        unused: Stored keys that the model does not load.
        blocks: Its MoE blocks, one per sparse layer.
        expert_map: Decoder layer to the expert of each router row, if it is a result in the mapped layout.
    """

    source: Source
    settings: MoESettings
    skeleton: Skeleton
    groups: Mapping[int | None, Group]
    unused: list[str]
    blocks: tuple[MoEBlock, ...]
    expert_map: Mapping[int, tuple[int, ...]] | None = None

    @property
    def parameters(self) -> int:
        """Parameters that the model loads, shared ones counted once."""
        shared = self.skeleton.module.all_tied_weights_keys.keys()
        return sum(tensor.numel() for name, tensor in self.skeleton.state.items() if name not in shared)

    @property
    def stored_keys(self) -> dict[int | None, list[str]]:
        """Stored keys that the model loads, by decoder layer; ``None`` is everything outside the layers."""
        return {layer: list(group.targets) for layer, group in self.groups.items()}

    def expert_parameters(self) -> int:
        """Parameters of all routed experts."""
        state = self.skeleton.state
        return sum(state[tensor.name].numel() for block in self.blocks for tensor in block.experts)


def read_model(source: Source) -> SourceModel:
    """Describes a source from its config and headers.

    Raises:
        SourceError: If files are missing or damaged, or contradict each other.
        UnsupportedModelError: If the model cannot be converted.
    """
    with _translate_errors(source):
        built = build_config(source.config)
    _check_architecture(built.model_type, source)
    settings = config_json.read_settings(built)
    config_json.check_aliases(source.config, settings)
    _check_plausible(source, settings)
    dtype = _compute_dtype(source)
    with _translate_errors(source):
        skeleton = Skeleton(source.config, dtype)
    groups, unused = skeleton.group_keys(source.tensors)
    check_against_config(skeleton, groups, source.tensors)
    # A map leads from N router rows; without it, the same config describes the N experts that they had.
    plain = plain_config(source.config)
    untied = skeleton if skeleton.expert_map is None else Skeleton(plain, dtype)
    twice = _with_experts(plain, built, settings, 2 * settings.experts)
    tensors = compare(untied.state, Skeleton(twice, dtype).state, experts=settings.experts)
    blocks = find_blocks(skeleton.layers_name, skeleton.layers, tensors, skeleton.state)
    if not blocks:
        raise UnsupportedModelError(
            f"{source.label} has no MoE layer, so there are no experts to merge or prune.",
            hint="pass a Mixture-of-Experts checkpoint; see 'hcsmoe architectures'",
        )
    model = SourceModel(
        source=source,
        settings=settings,
        skeleton=skeleton,
        groups=groups,
        unused=unused,
        blocks=blocks,
        expert_map=skeleton.expert_map,
    )
    _check_expert_dtypes(model)
    return model


@contextmanager
def _translate_errors(source: Source) -> Iterator[None]:
    """Turns the errors of transformers over a config that it cannot build into one message.

    Raises:
        SourceError: In place of each of them.
    """
    try:
        yield
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise SourceError(
            f"transformers cannot build a model from config.json of {source.label}: {' '.join(lines[:2])}",
            hint="correct config.json, or download it again",
        ) from error


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


def _check_architecture(model_type: str, source: Source) -> None:
    architecture = ARCHITECTURES.get(model_type)
    supported = "see 'hcsmoe architectures' for what is supported"
    if architecture is None:
        settings = config_json.has_expert_count(source.config)
        kind = "is not supported" if settings else "is a dense model: its config names no experts to merge"
        raise UnsupportedModelError(f"{source.label} has model_type {model_type!r}, which {kind}.", hint=supported)
    if architecture.refusal:
        raise UnsupportedModelError(
            f"{source.label} has model_type {model_type!r}, which is refused: {architecture.refusal}.", hint=supported
        )


def _compute_dtype(source: Source) -> torch.dtype:
    """The dtype in which most of the weights are stored, or that they are dequantised to."""
    if quantization_method(source.config) is not None:
        return torch.bfloat16
    sizes: Counter[torch.dtype] = Counter()
    for tensor in source.tensors.values():
        if tensor.dtype.is_floating_point:
            sizes[tensor.dtype] += tensor.nbytes
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
        for key, target in group.targets.items():
            dtype = model.source.tensors[key].dtype
            if target in experts - group.dequantized and dtype != model.skeleton.dtype:
                raise UnsupportedModelError(
                    f"expert tensor {key!r} is stored as {dtype}, most weights as {model.skeleton.dtype}: "
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
    return config_json.edit(config, built, settings, after, without_quantization=True)
