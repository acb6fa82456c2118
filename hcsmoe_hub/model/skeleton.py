"""A transformers model without weights, and the map between its parameters and the stored names."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hcsmoe_hub.checkpoint import modeling_hcsmoe_factored
from hcsmoe_hub.checkpoint.formats import LogicalTensor
from hcsmoe_hub.checkpoint.modeling_hcsmoe import CLASS_PREFIX, MappedExperts, read_expert_map
from hcsmoe_hub.checkpoint.modeling_hcsmoe_factored import FactoredExperts, read_sizes
from hcsmoe_hub.errors import UnsupportedModelError
from hcsmoe_hub.model.model_class import build_config, model_class
from hcsmoe_hub.model.mtp import MtpHead, add_parts, with_head
from hcsmoe_hub.model.stacked_experts import StackedModel
from hcsmoe_hub.model.transformers_seam import (
    Conversion,
    build_without_weights,
    converted_part,
    further_parameters,
    model_conversions,
    optional_transposition,
    parameter_of,
    stacked_part,
    to_stored,
    unsplit_classes,
)

# Numbers of layers and experts in a name.
_NUMBERS = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass
class Group:
    """Stored names that belong together: one layer, or everything outside the layers.

    Attributes:
        targets: Stored name to the parameter that it becomes, or is a part of.
        renamed: Stored names that are only renamed, never converted.
        transposed: Stored names of tensors that only have two dimensions swapped, to these.
        stacked: Stored names of tensors of one expert that are only stacked and joined, to the number of the part that
            they are of it.
        converted: The part of a name that a conversion replaces (``experts.3.w1.weight``), to the whole stored name.
        further: Other parameters that conversions make of these tensors.
        conversions: What to undo when parameters of this group are written.
    """

    targets: dict[str, str] = field(default_factory=dict)
    renamed: set[str] = field(default_factory=set)
    transposed: dict[str, tuple[int, int]] = field(default_factory=dict)
    stacked: dict[str, int] = field(default_factory=dict)
    converted: dict[str, str] = field(default_factory=dict)
    further: set[str] = field(default_factory=set)
    conversions: list[Conversion] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where stored tensors belong in a model.

    Attributes:
        tensors: All of them, by name.
        groups: Those that text runs through, by layer; ``None`` is everything outside the layers.
        aside: Those of parts that text does not run through, such as a vision tower, to their parameters.
        unused: Those that the model does not have.
    """

    tensors: Mapping[str, LogicalTensor]
    groups: dict[int | None, Group]
    aside: dict[str, str]
    unused: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken:
    """A stored tensor with numbers that are not finite.

    Attributes:
        name: Its stored name.
        layer: Its layer; ``None`` outside the layers.
        parameter: The parameter that it becomes, or is a part of.
    """

    name: str
    layer: int | None
    parameter: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stack:
    """A list of layers that one module of a model runs.

    Attributes:
        name: Name of the list.
        layers: The layers.
        first: Number of the first one among those of all stacks.
    """

    name: str
    layers: nn.ModuleList
    first: int = 0

    @property
    def runner_name(self) -> str:
        """Name of the module that runs the layers."""
        return self.name.rpartition(".")[0]


class Skeleton:
    """A model on the meta device: shapes, names and a working forward pass, but no weights.

    Args:
        config: Raw ``config.json``.
        dtype: Dtype of the weights once they are loaded.
        mtp: The checkpoint's MTP head, built as a decoder layer after the last one; ``None`` builds none.

    Attributes:
        factors: Sizes of the factors of all experts, for a result in the factored layout.
        expert_map: Decoder layer to the expert of each router row, for a result in the mapped layout.
        stacks: The encoder's layers and the decoder's; those of the decoder alone where there is no encoder.
        layers: The layers of all stacks, numbered through, and after them that of the MTP head.
        broken: Stored tensors with numbers that are not finite, among those that have been loaded, by name.
    """

    def __init__(self, config: Mapping[str, Any], dtype: torch.dtype, *, mtp: MtpHead | None = None) -> None:
        self.dtype = dtype
        self.mtp = mtp
        self.broken: dict[str, Broken] = {}
        self.config = build_config(config)
        _set_dtype(self.config, dtype)
        # Collected over the whole calibration set, the logits of every router would outweigh the layers.
        self.text_config.output_router_logits = False
        self.factors = read_sizes(self.config)
        self.expert_map = read_expert_map(self.config) if self.factors is None else None
        model_type = model_class(self.config)
        if self.is_encoder_decoder:
            # Before what ties experts or makes factors of them, which begins with what this one leaves.
            model_type = type(model_type.__name__, (StackedModel, model_type), {})
        if self.factors is not None:
            name = modeling_hcsmoe_factored.CLASS_PREFIX + model_type.__name__
            model_type = type(name, (FactoredExperts, model_type), {})
        if self.expert_map is not None:
            model_type = type(CLASS_PREFIX + model_type.__name__, (MappedExperts, model_type), {})
        with nullcontext() if mtp is None else with_head(self.config):
            self.module: PreTrainedModel = build_without_weights(model_type, self.config, dtype)
        self.stacks = self._find_stacks()
        self.layers: Sequence[nn.Module] = [layer for stack in self.stacks for layer in stack.layers]
        if mtp is not None:
            add_parts(self.layers[mtp.layer], self.config, dtype)

    def _find_stacks(self) -> tuple[Stack, ...]:
        """The lists of modules that transformers never splits: of an encoder and a decoder, both.

        Of a decoder alone it is the longest one, in the language model if there are several.
        """
        class_names = unsplit_classes(self.module)
        found = [
            (name, module)
            for name, module in self.module.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) and type(module[0]).__name__ in class_names
        ]
        if not found:
            raise UnsupportedModelError(
                f"{type(self.module).__name__} has no list of decoder layers, so it cannot be streamed layer by layer.",
                hint="see 'hcsmoe architectures' for what is supported",
            )
        if self.is_encoder_decoder:
            if len(found) != 2:
                raise UnsupportedModelError(
                    f"{type(self.module).__name__} has {len(found)} lists of layers; one of an encoder and one of a "
                    "decoder were expected.",
                    hint="see 'hcsmoe architectures' for what is supported",
                )
            (encoder, layers), (decoder, others) = found
            return Stack(name=encoder, layers=layers), Stack(name=decoder, layers=others, first=len(layers))
        text = self.text_config

        def is_of_text(name: str) -> bool:
            return getattr(self.module.get_submodule(name.rpartition(".")[0]), "config", None) is text

        name, layers = max(found, key=lambda item: (is_of_text(item[0]), len(item[1])))
        return (Stack(name=name, layers=layers),)

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether an encoder reads one text, and a decoder writes another."""
        return bool(getattr(self.config, "is_encoder_decoder", False))

    @property
    def depth(self) -> int:
        """Number of layers of the model itself, of all stacks, without that of an MTP head."""
        return len(self.layers) - (self.mtp is not None)

    @property
    def encoder_depth(self) -> int:
        """Number of the encoder's layers, which come before those of the decoder; 0 without an encoder."""
        return self.stacks[-1].first

    @property
    def layers_name(self) -> str:
        """Name of the list of the decoder's layers."""
        return self.stacks[-1].name

    @property
    def layers_by_path(self) -> dict[str, nn.Module]:
        """The layers by name, in the order of their numbers."""
        return {self.layer_path(number): layer for number, layer in enumerate(self.layers)}

    def layer_path(self, number: int) -> str:
        """Name of a layer's module, such as ``encoder.block.3``.

        Args:
            number: Of the layer, among those of all stacks.
        """
        stack = next(stack for stack in reversed(self.stacks) if stack.first <= number)
        return f"{stack.name}.{number - stack.first}"

    @property
    def text_config(self) -> PreTrainedConfig:
        """The config of the language model, which is a section of a composite's."""
        return self.config.get_text_config()

    @property
    def decoder_name(self) -> str:
        """Name of the module that runs the decoder layers; not every model declares it as its base model."""
        return self.stacks[-1].runner_name

    @property
    def decoder(self) -> nn.Module:
        """The module that runs the decoder layers."""
        return self.module.get_submodule(self.decoder_name)

    @cached_property
    def state(self) -> dict[str, Tensor]:
        """Every parameter and persistent buffer, on the meta device; taken before anything is loaded."""
        return dict(self.module.state_dict())

    @cached_property
    def aside(self) -> set[str]:
        """Parameters that text does not run through: what a composite has besides its decoder and the head."""
        if self.text_config is self.config:
            return set()
        head = self.module.get_output_embeddings()
        used = {id(module) for module in (*self.decoder.modules(), *(head.modules() if head else ()))}
        prefixes = tuple(f"{name}." for name, module in self.module.named_modules() if id(module) in used and name)
        return {name for name in self.state if not name.startswith(prefixes)}

    def layer_of(self, parameter: str) -> int | None:
        """Number of the layer that holds a parameter, ``None`` outside the layers."""
        for stack in self.stacks:
            if match := re.match(rf"{re.escape(stack.name)}\.(\d+)\.", parameter):
                return stack.first + int(match.group(1))
        return None

    def place(self, tensors: Mapping[str, LogicalTensor]) -> Placement:
        """Sorts stored tensors by layer, as transformers' loader would place them."""
        groups: dict[int | None, Group] = defaultdict(Group)
        aside: dict[str, str] = {}
        kinds: dict[tuple[str, ...], int | None] = {}
        unused = []
        for name, tensor in tensors.items():
            parameter, part = self._parameter_of(name, self._conversions)
            if parameter not in self.state:
                unused.append(name)
            elif parameter in self.aside:
                aside[name] = parameter
            else:
                group = groups[self.layer_of(parameter)]
                group.targets[name] = parameter
                swapped = None if part is None else optional_transposition(self.in_model(name), self._conversions)
                if part is None or (swapped and tensor.shape == tuple(self.state[parameter].shape)):
                    group.renamed.add(name)
                elif swapped:
                    group.transposed[name] = swapped
                else:
                    group.converted[part] = name
                    # What holds for one expert of one layer holds for all of them, and to ask takes its time.
                    kind = tuple(_NUMBERS.sub("*", words) for words in (parameter, part))
                    if kind not in kinds:
                        kinds[kind] = stacked_part(self.in_model(name), self._conversions)
                    if (number := kinds[kind]) is not None:
                        group.stacked[name] = number
                    group.further.update(further_parameters(self.in_model(name), parameter, self._conversions))
        for group in groups.values():
            # Per group: a renaming that fits one layer (a sparse one, say) may hit names of another that never had it.
            conversions = model_conversions(self.module)
            for name in group.targets:
                self._parameter_of(name, conversions)
            group.conversions = [conversion for conversion in conversions if conversion.was_used()]
        return Placement(tensors=tensors, groups=dict(groups), aside=aside, unused=unused)

    def _parameter_of(self, name: str, conversions: list[Conversion]) -> tuple[str, str | None]:
        """Parameter that a stored name becomes, and the part of the name that a conversion replaces."""
        return parameter_of(self.in_model(name), conversions, self.module.base_model_prefix, self.state)

    def parameters_of(self, names: Iterable[str]) -> dict[str, str]:
        """The parameters that stored names become, or would become if they were among those of the model."""
        return {name: self._parameter_of(name, self._conversions)[0] for name in names}

    def in_model(self, name: str) -> str:
        """A stored name as the model's conversions know it: the names of an MTP head become those of a layer."""
        return name if self.mtp is None else self.mtp.as_layer(name, self.layers_name)

    @cached_property
    def _conversions(self) -> list[Conversion]:
        return model_conversions(self.module)

    def to_stored(self, tensors: Mapping[str, Tensor], group: Group) -> dict[str, Tensor]:
        """Parameters under their in-memory names to tensors under the source's stored names.

        Works on the meta device as well, which is how the plan learns the names of the result. A tensor that the group
        has not stored keeps the name that transformers would give it.

        Args:
            tensors: Parameters of one group, with any number of experts.
            group: Where they belong.
        """
        names = {group.targets[name]: name for name in (*group.renamed, *group.transposed)}
        found = {names[parameter]: tensor for parameter, tensor in tensors.items() if parameter in names}
        for name in group.transposed.keys() & found.keys():
            found[name] = found[name].transpose(*group.transposed[name]).contiguous()
        others = {parameter: tensor for parameter, tensor in tensors.items() if parameter not in names}
        if others:
            for name, tensor in to_stored(self.module, others, group.conversions).items():
                part = converted_part(name, self._conversions)
                found[group.converted.get(part or "", name)] = tensor
        return found


def _set_dtype(config: PreTrainedConfig, dtype: torch.dtype) -> None:
    """Gives a config and all of its sections a dtype: the models of a composite are built in that of their section."""
    config.dtype = dtype
    for name in config.sub_configs:
        section = getattr(config, name, None)
        if isinstance(section, PreTrainedConfig):
            _set_dtype(section, dtype)
