"""Experts of encoder-decoder models, which transformers keeps module by module, as the fused tensors of all others.

The router of such a block returns masks; here it says which experts a token visits and with which weights, as routers
do everywhere else. A token that its router drops visits no expert: its weight is 0.

B sequences, S tokens each, T tokens, E experts, H hidden size, I expert intermediate size, K experts per token.
"""

import sys
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hcsmoe_hub.errors import UnsupportedModelError
from hcsmoe_hub.model.microbatch import Uncut, bare
from hcsmoe_hub.model.transformers_seam import Conversion, stacking


class StackedExperts(nn.Module):
    """The experts of one layer without gates, ``up_proj [E, I, H]`` and ``down_proj [E, H, I]``.

    Args:
        experts: The same as modules of transformers, one after the other.

    Attributes:
        linears: What transformers calls the two projections of an expert.
    """

    linears: ClassVar[tuple[str, str]]
    has_gate = has_post_expert_norm = is_transposed = False
    is_concatenated = True

    def __init__(self, experts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        # A list of transformers may hold other things than experts.
        own: list[Any] = [expert for name, expert in experts.items() if name.startswith("expert_")]
        first = own[0]
        self.num_experts = len(own)
        self.act_fn = first.act
        self.has_bias = first.get_submodule(self.linears[0]).bias is not None
        for name, linear in zip(("up_proj", "down_proj"), self.linears, strict=True):
            for suffix, part in (("", "weight"), *((("_bias", "bias"),) if self.has_bias else ())):
                values = getattr(first.get_submodule(linear), part)
                stacked = values.new_empty(len(own), *values.shape)
                self.register_parameter(f"{name}{suffix}", nn.Parameter(stacked, requires_grad=False))

    @classmethod
    def own_conversions(cls) -> list[Conversion]:
        """How the stored tensors of experts become those of this module."""
        parts = (("weight", ""), ("bias", "_bias"))
        return [
            stacking(f"experts.expert_*.{linear}.{part}", f"experts.{name}{suffix}")
            for name, linear in zip(("up_proj", "down_proj"), cls.linears, strict=True)
            for part, suffix in parts
        ]

    def forward(self, tokens_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """The router-weighted sum of the experts' outputs, ``[T, H]``.

        Args:
            tokens_TH: Inputs.
            index_TK: Chosen experts.
            weight_TK: Router weights of the choices; 0 for none.
        """
        output_TH = torch.zeros_like(tokens_TH)
        chosen_TK = torch.where(weight_TK != 0, index_TK, -1)
        for expert in chosen_TK.unique().tolist():
            if expert < 0:
                continue
            token, slot = torch.where(chosen_TK == expert)
            hidden = self.act_fn(self._linear("up_proj", expert, tokens_TH[token]))
            output = self._linear("down_proj", expert, hidden) * weight_TK[token, slot, None]
            output_TH.index_add_(0, token, output.to(output_TH.dtype))
        return output_TH

    def _linear(self, name: str, expert: int, inputs: Tensor) -> Tensor:
        weight: Tensor = getattr(self, name)[expert]
        bias: Tensor | None = getattr(self, f"{name}_bias")[expert] if self.has_bias else None
        return nn.functional.linear(inputs, weight, bias)


class StackedSwitchExperts(StackedExperts):
    """Those of Switch Transformers."""

    linears = ("wi", "wo")


class StackedNllbExperts(StackedExperts):
    """Those of NLLB-MoE."""

    linears = ("fc1", "fc2")


class SwitchBlock(nn.Module):
    """Router and experts of a Switch Transformers layer: one expert per token, so many tokens of a sequence for each.

    The block also takes the position of every token in its sequence, which a hook adds where the model calls it: the
    tokens of a batch can then run again in any other arrangement, and the capacity still counts those of a sequence.

    Args:
        sparse: The block as transformers builds it.
    """

    def __init__(self, sparse: Any) -> None:
        super().__init__()
        self.router = sparse.router
        self.experts = StackedSwitchExperts(sparse.experts)
        self.capacity = int(self.router.expert_capacity)
        # The limit is applied here.
        self.router.expert_capacity = sys.maxsize
        self.register_forward_pre_hook(_add_positions)

    def forward(self, hidden_BSH: Tensor, position_BS: Tensor) -> Tensor:
        """The outputs of the chosen experts, ``[B, S, H]``; 0 for a token that is dropped.

        Args:
            hidden_BSH: Inputs.
            position_BS: Ascending within a sequence.
        """
        mask_BSE, weight_BS1, _ = self.router(hidden_BSH)
        index_TK, weight_TK = mask_BSE.argmax(-1).flatten()[:, None], weight_BS1.flatten()[:, None]
        is_kept_T = _within(self.capacity, index_TK[:, 0], position_BS, experts=mask_BSE.shape[-1])
        weight_TK = weight_TK.masked_fill(~is_kept_T[:, None], 0)
        output_TH: Tensor = self.experts(hidden_BSH.flatten(0, 1), index_TK, weight_TK)
        return output_TH.view_as(hidden_BSH)


def _add_positions(_block: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    if len(args) > 1:
        return args
    batch, length = args[0].shape[:2]
    return args[0], torch.arange(length, dtype=torch.int32, device=args[0].device).expand(batch, length)


def _within(capacity: int, index_T: Tensor, position_BS: Tensor, *, experts: int) -> Tensor:
    """Whether each token is among the first of its sequence that its expert has room for.

    Args:
        capacity: Tokens of a sequence for every expert.
        index_T: The expert of each token.
        position_BS: Its position in its sequence; where it does not grow, another sequence begins.
        experts: E.
    """
    begins = torch.ones_like(position_BS, dtype=torch.bool)
    begins[:, 1:] = position_BS[:, 1:] <= position_BS[:, :-1]
    sequence_T = begins.flatten().cumsum(0) - 1
    # Tokens of the same sequence and expert, in their order.
    key_T = sequence_T * experts + index_T
    order_T = key_T.sort(stable=True).indices
    sorted_T = key_T[order_T]
    rank_T = torch.arange(len(key_T), device=key_T.device) - torch.searchsorted(sorted_T, sorted_T)
    return torch.empty_like(rank_T).scatter_(0, order_T, rank_T) < capacity


class NllbBlock(nn.Module):
    """Router and experts of an NLLB-MoE layer: two experts per token, all of them with the weights of the router.

    transformers 5.23 itself runs every token through its first two experts, whatever the router says. What a model was
    trained with is what fairseq and transformers 4 compute: this.

    Args:
        sparse: The block as transformers builds it.

    Raises:
        UnsupportedModelError: If the second expert is drawn at random.
    """

    def __init__(self, sparse: Any) -> None:
        super().__init__()
        self.router = sparse.router
        if self.router.second_expert_policy != "all":
            raise UnsupportedModelError(
                f"config.json says second_expert_policy = {self.router.second_expert_policy!r}, so the second expert "
                "of a token is drawn at random; a conversion needs a model that does the same whenever it runs.",
                hint="set second_expert_policy to 'all' in config.json",
            )
        # What is dropped in training is scaled down otherwise.
        self.scale = 1 - float(sparse.experts.moe_token_dropout)
        self.experts = StackedNllbExperts(sparse.experts)
        self.register_forward_pre_hook(_without_mask)

    def forward(self, hidden_BSH: Tensor) -> Tensor:
        """The router-weighted outputs of the chosen experts, ``[B, S, H]``.

        Args:
            hidden_BSH: Inputs; none of them is padding.
        """
        tokens_TH = hidden_BSH.flatten(0, 1)
        _, weight_TE, _ = self.router(tokens_TH)
        weight_TK, index_TK = weight_TE.topk(2, dim=-1)
        output_TH: Tensor = self.experts(tokens_TH, index_TK, weight_TK * self.scale)
        return output_TH.view_as(hidden_BSH)


def _without_mask(_block: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What a block is called with, without the mask of padding tokens, of which there are none."""
    return args[:1]


_BLOCKS: Mapping[str, type[nn.Module]] = {
    "SwitchTransformersSparseMLP": SwitchBlock,
    "NllbMoeSparseMLP": NllbBlock,
}
# Layers that return position biases which all layers share.
_SHARING = "SwitchTransformersBlock"
# Place of the bias of cross-attention among what a layer takes after that of its own attention.
_OTHER_BIAS = 2


def stack_experts(model: PreTrainedModel) -> None:
    """Gives the MoE blocks of a model without weights fused experts, where transformers keeps them module by module."""
    for name, module in list(model.named_modules()):
        kind = _BLOCKS.get(type(module).__name__)
        if kind is not None:
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, kind(module).eval())
        elif type(module).__name__ == _SHARING:
            module.__class__ = _sharing(type(module))


def _sharing(layer_type: Any) -> Any:
    """The same class of layers, whose forward says what of its output belongs to all sequences."""

    def forward(self: Any, hidden_BSH: Tensor, mask: Tensor, bias: Any = None, *args: Any, **kwargs: Any) -> Any:
        # The last of several batches may be smaller than the first, whose biases it is given.
        rows, others = len(hidden_BSH), list(args)
        if len(others) > _OTHER_BIAS:
            others[_OTHER_BIAS] = _first_rows(others[_OTHER_BIAS], rows)
        hidden, *shared = layer_type.forward(self, hidden_BSH, mask, _first_rows(bias, rows), *others, **kwargs)
        return hidden, *(Uncut(value) if isinstance(value, Tensor) else value for value in shared)

    return type(layer_type.__name__, (layer_type,), {"forward": forward})


def _first_rows(bias: Any, rows: int) -> Any:
    """A position bias for the first sequences of those that it was made for; models run in one piece pass it on."""
    bias = bare(bias)
    return bias[:rows] if isinstance(bias, Tensor) else bias


def shares_biases(layers: Iterable[nn.Module]) -> bool:
    """Whether layers share position biases, masks included, so that what they run side by side must have one mask."""
    return any(_SHARING in (base.__name__ for base in type(layer).__mro__) for layer in layers)


class StackedModel:
    """Put before the class of a model that keeps its experts module by module: gives it fused ones."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        parent: Any = super()
        parent.__init__(config, *args, **kwargs)
        model: Any = self
        stack_experts(model)

    @classmethod
    def is_custom_code(cls) -> bool:
        """Says no: names of stored tensors are converted as for the class of transformers that this one extends."""
        return False
