"""Floating-point operations of one token, from the model's own forward without weights.

The model runs on the meta device, where tensors have shapes only, and torch's ``FlopCounterMode`` counts every matrix
product and convolution as two operations per multiply-add. Element-wise work (norms, activations, softmax) is not
counted, as is usual. Two parts are replaced, since what they compute depends on values:

* Experts: a token runs through one expert for each of the router's choices, and all experts of a layer have one shape.
* Attention: only the pairs of query and key that the model's mask allows are counted, so that causal, windowed and
  chunked attention cost what they need, not a whole square.

B batch, Q queries, S keys, T tokens, K experts per token, H hidden size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.fx.experimental._config as fx_config
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, AttentionMaskInterface

from hcsmoe_hub.checkpoint.modeling_hcsmoe_factored import INCOMING, OUTGOING, experts_modules, product
from hcsmoe_hub.model.expert_kinds import experts_of, is_experts_module, use_probe
from hcsmoe_hub.model.experts import Experts
from hcsmoe_hub.model.layer_loader import move_computed_buffers
from hcsmoe_hub.model.skeleton import Skeleton
from hcsmoe_hub.model.transformers_seam import attention_mask

META = torch.device("meta")
_HOST = torch.device("cpu")
_ATTENTION = "hcsmoe_counted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Flops:
    """Operations of one token.

    Attributes:
        prefill: Mean over the tokens of a prompt. With an encoder: what it makes of the prompt and the first token that
            the decoder writes, per token of the prompt.
        decode: Of the token after the prompt, with the prompt in the cache. With an encoder: of the token that the
            decoder writes after as many as the prompt has.
        is_masked: Whether only the pairs of query and key that the mask allows are counted; otherwise all pairs are.
        active_experts: Experts per token of each experts module, by its name in the model.
    """

    prefill: float
    decode: int
    is_masked: bool
    active_experts: dict[str, int]


class CannotCountError(Exception):
    """The forward of a model cannot run on shapes alone; the message says why."""


@dataclass(slots=True)
class _Counter:
    """What the replaced parts add up.

    Attributes:
        mask_device: Where masks are made. On the host their values are known; some models mix them with tensors that
            have none, and need masks without values as well.
        attention: Operations of attention so far.
        is_masked: Whether every mask so far had values.
        has_attended: Whether the model's attention is replaced; one with code of its own multiplies all pairs.
        active_experts: Experts per token by the name of the experts module.
    """

    mask_device: torch.device
    attention: int = 0
    is_masked: bool = True
    has_attended: bool = False
    active_experts: dict[str, int] = field(default_factory=dict)

    def mask(self, **given: Any) -> Tensor | None:
        """A mask ``[B, 1, Q, S]`` as transformers asks for it, also where it could be left out."""
        return attention_mask(**{**given, "device": self.mask_device, "attention_mask": None})

    def attend(
        self,
        module: nn.Module,
        query_BNQD: Tensor,
        key_BNSD: Tensor,
        value_BNSD: Tensor,
        attention_mask: Any,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """Counts the products of attention; the output ``[B, Q, N, D]`` has a shape only."""
        self.has_attended = True
        batch, heads, queries, width = query_BNQD.shape
        pairs = batch * queries * key_BNSD.shape[2]
        if _has_values(attention_mask):
            # A mask of one sequence or of one head may stand for all of them.
            pairs = int(attention_mask.sum()) * batch // attention_mask.shape[0] // attention_mask.shape[1]
        elif queries > 1:
            self.is_masked = False
        self.attention += 2 * heads * pairs * (width + value_BNSD.shape[-1])
        return query_BNQD.new_empty(batch, queries, heads, value_BNSD.shape[-1]), None

    def operations(self, run: Callable[[], Any]) -> tuple[int, Any]:
        """Operations of one pass of the model, and its output."""
        self.attention = 0
        with FlopCounterMode(display=False) as counted:
            output = run()
        return counted.get_total_flops() + self.attention, output

    def route(self, name: str, experts: Experts, tokens_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """Runs every choice of the router through the first expert."""
        experts.project(0, experts.hidden(0, self._routed(name, tokens_TH, index_TK)))
        return torch.empty_like(tokens_TH)

    def route_factored(self, name: str, experts: Any, states: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """The same for experts whose matrices are stored as factors."""
        routed_RH = self._routed(name, states.reshape(-1, states.shape[-1]), index_TK)
        for part in range(experts.incoming_u.shape[1]):
            product(experts, INCOMING, 0, part, routed_RH)
        hidden_RI = routed_RH.new_empty(len(routed_RH), experts.outgoing_v.shape[-1])
        product(experts, OUTGOING, 0, 0, hidden_RI)
        return torch.empty_like(states)

    def _routed(self, name: str, tokens_TH: Tensor, index_TK: Tensor) -> Tensor:
        self.active_experts[name] = index_TK.shape[-1]
        return tokens_TH.repeat_interleave(index_TK.shape[-1], dim=0)


def count_flops(skeleton: Skeleton, context: int) -> Flops:
    """Counts the operations of one token at a context length, the output head included.

    Where the keys of cached tokens are expanded anew for every token (multi-head latent attention), that is counted, as
    transformers computes it.

    Args:
        skeleton: The model without weights; it cannot be used for anything else afterwards.
        context: Tokens of the prompt.

    Raises:
        CannotCountError: If the model cannot run on shapes alone.
    """
    move_computed_buffers(skeleton.module, META)
    try:
        return _count(skeleton, context, _Counter(_HOST))
    except RuntimeError:
        # What an indexer chooses is not known without values: masks have none either, and all pairs are counted.
        pass
    try:
        with _all_chosen():
            return _count(skeleton, context, _Counter(META))
    except RuntimeError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CannotCountError(f"its forward cannot run on shapes alone: {reason}") from error


def _count(skeleton: Skeleton, context: int, counter: _Counter) -> Flops:
    ids_BS = torch.zeros(1, context, dtype=torch.long, device=META)
    model: Any = partial(skeleton.module, use_cache=True)
    with _replaced(skeleton, counter), torch.no_grad():
        if skeleton.is_encoder_decoder:
            encoder: Any = skeleton.module.get_encoder()
            encoding, encoded = counter.operations(lambda: encoder(input_ids=ids_BS))
            model = partial(model, encoder_outputs=encoded)
            beginning, _ = counter.operations(lambda: model(decoder_input_ids=ids_BS[:, :1]))
            in_prompt = encoding + beginning
            cache = model(decoder_input_ids=ids_BS).past_key_values
            after, _ = counter.operations(lambda: model(decoder_input_ids=ids_BS[:, :1], past_key_values=cache))
        else:
            in_prompt, output = counter.operations(lambda: model(input_ids=ids_BS))
            cache = output.past_key_values
            after, _ = counter.operations(lambda: model(input_ids=ids_BS[:, :1], past_key_values=cache))
    return Flops(
        prefill=in_prompt / context,
        decode=after,
        # The one token that a decoder writes first sees all that there is.
        is_masked=skeleton.is_encoder_decoder or (counter.is_masked and counter.has_attended),
        active_experts=counter.active_experts,
    )


def _has_values(mask: Any) -> bool:
    """Whether a mask is one of those made on the host."""
    return isinstance(mask, Tensor) and mask.device.type != META.type and mask.dtype == torch.bool


@contextmanager
def _all_chosen() -> Iterator[None]:
    """Lets tensors without values count as nonzero everywhere inside a ``with`` block."""
    # torch has no public name for this switch.
    settings: Any = fx_config
    with settings.patch(meta_nonzero_assume_all_nonzero=True):
        yield


@contextmanager
def _replaced(skeleton: Skeleton, counter: _Counter) -> Iterator[None]:
    """Replaces attention and experts of a model inside a ``with`` block."""
    AttentionInterface.register(_ATTENTION, counter.attend)
    AttentionMaskInterface.register(_ATTENTION, counter.mask)
    skeleton.module.set_attn_implementation(_ATTENTION)
    names = {module: name for name, module in skeleton.module.named_modules()}
    if skeleton.factors is not None:
        for name, experts in experts_modules(skeleton.module).items():
            vars(experts)["forward"] = partial(counter.route_factored, name, experts)
        yield
        return
    use_probe(skeleton.module)
    watched = []
    for parent in list(names):
        for child in parent.children():
            if is_experts_module(child):
                experts_of(child).observe(parent, partial(counter.route, names[child]))
                watched.append((experts_of(child), parent))
    try:
        yield
    finally:
        for experts, parent in watched:
            experts.stop(parent)
