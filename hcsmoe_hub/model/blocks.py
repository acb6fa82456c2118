"""Finds the MoE blocks of a model and every tensor whose size follows the number of experts.

No attribute is guessed: the same model is built for N and for 2N experts (both without weights), and whatever changes
its shape is sized by experts. The slope is the number of rows per expert, the rest are rows that belong to no routed
expert (a skip class, shared experts) and stay as they are.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hcsmoe_hub.errors import UnsupportedModelError
from hcsmoe_hub.model.architectures import REPORT_HINT
from hcsmoe_hub.model.expert_kinds import is_experts_module

# Buffers that list expert numbers: their values, not their shape, follow the experts (DeepSeek-V4's hash routing).
EXPERT_ID_TABLES = ("tid2eid",)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertTensor:
    """A parameter or buffer that is sized by the number of experts.

    Attributes:
        name: Full name in the model.
        dim: Dimension along which the experts lie.
        rows_per_expert: Entries that each expert takes along ``dim``.
        extra_rows: Entries at the end that belong to no routed expert.
    """

    name: str
    dim: int
    rows_per_expert: int
    extra_rows: int

    def split(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """Splits into the experts' part ``[E, ...]``, experts first, and the extra rows ``[extra, ...]``."""
        rows = tensor.movedim(self.dim, 0)
        experts, extra = rows[: rows.shape[0] - self.extra_rows], rows[rows.shape[0] - self.extra_rows :]
        if self.rows_per_expert > 1:
            experts = experts.unflatten(0, (-1, self.rows_per_expert))
        return experts, extra

    def join(self, experts: Tensor, extra: Tensor) -> Tensor:
        """Inverse of ``split``."""
        if self.rows_per_expert > 1:
            experts = experts.flatten(0, 1)
        rows = torch.cat([experts, extra]) if self.extra_rows else experts
        return rows.movedim(0, self.dim).contiguous()


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEBlock:
    """The MoE block of one layer.

    Attributes:
        layer: Number of the layer.
        path: Module that holds router and experts; its input and output are what a merge must preserve.
        experts_path: Module that holds the experts' weights.
        experts: Tensors of the experts themselves.
        router: Tensors of the router and of everything else sized by experts.
        tables: Buffers that list expert numbers.
        is_whole_layer: Whether router and experts hang on the layer itself, so that the block's input is the
            layer's.
    """

    layer: int
    path: str
    experts_path: str
    experts: tuple[ExpertTensor, ...]
    router: tuple[ExpertTensor, ...]
    tables: tuple[str, ...]
    is_whole_layer: bool = False

    @property
    def edited(self) -> set[str]:
        """Names of every tensor that a conversion changes."""
        return {tensor.name for tensor in (*self.experts, *self.router)} | set(self.tables)

    def name_in_experts(self, tensor: ExpertTensor) -> str:
        """Name of one of its experts' tensors relative to the experts module, such as ``gate_up_proj``."""
        return tensor.name.removeprefix(f"{self.experts_path}.")

    def full_name(self, name: str) -> str:
        """Full name in the model of a tensor of the experts module; undoes ``name_in_experts``."""
        return f"{self.experts_path}.{name}"


def compare(state_n: Mapping[str, Tensor], state_2n: Mapping[str, Tensor], *, experts: int) -> dict[str, ExpertTensor]:
    """Finds the tensors that differ between a model of ``experts`` experts and one of twice as many.

    Raises:
        UnsupportedModelError: If a tensor does not grow along one dimension in proportion to the experts.
    """
    found = {}
    for name, tensor in state_n.items():
        small, large = tensor.shape, state_2n[name].shape
        changed = [dim for dim, (a, b) in enumerate(zip(small, large, strict=True)) if a != b]
        if not changed:
            continue
        dim = changed[0]
        rows, remainder = divmod(large[dim] - small[dim], experts)
        extra = small[dim] - rows * experts
        if len(changed) > 1 or remainder or rows < 1 or extra < 0:
            raise UnsupportedModelError(
                f"tensor {name} is {list(small)} with {experts} experts and {list(large)} with {2 * experts}: "
                "its rows cannot be assigned to experts.",
                hint=REPORT_HINT,
            )
        found[name] = ExpertTensor(name=name, dim=dim, rows_per_expert=rows, extra_rows=extra)
    return found


def find_blocks(
    layers: Mapping[str, nn.Module], tensors: Mapping[str, ExpertTensor], state: Mapping[str, Tensor]
) -> tuple[MoEBlock, ...]:
    """Assigns every expert-sized tensor to the MoE block of its layer.

    Args:
        layers: The layers by name, in the order of their numbers.
        tensors: The tensors that are sized by experts, by name.
        state: All tensors of the model, by name.

    Raises:
        UnsupportedModelError: If an expert-sized tensor lies outside a block that can be observed.
    """
    blocks = []
    unassigned = dict(tensors)
    for layer, (prefix, module) in enumerate(layers.items()):
        paths = [f"{prefix}.{name}" for name, child in module.named_modules() if is_experts_module(child)]
        if not paths:
            continue
        if len(paths) > 1:
            raise UnsupportedModelError(
                f"layer {layer} has {len(paths)} sets of experts; one was expected.", hint=REPORT_HINT
            )
        experts_path = paths[0]
        path = experts_path.rpartition(".")[0]
        inside = [name for name in unassigned if name.startswith(f"{path}.")]
        parts: dict[bool, list[ExpertTensor]] = defaultdict(list)
        for name in inside:
            parts[name.startswith(f"{experts_path}.")].append(unassigned.pop(name))
        tables = [name for name in state if name.startswith(f"{path}.") and name.split(".")[-1] in EXPERT_ID_TABLES]
        blocks.append(
            MoEBlock(
                layer=layer,
                path=path,
                experts_path=experts_path,
                experts=tuple(parts[True]),
                router=tuple(parts[False]),
                tables=tuple(tables),
                is_whole_layer=path == prefix,
            )
        )
    if unassigned:
        raise UnsupportedModelError(
            f"tensor {next(iter(unassigned))} is sized by the number of experts but lies outside any MoE block.",
            hint=REPORT_HINT,
        )
    return tuple(blocks)
