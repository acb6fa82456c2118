"""How one expert computes, whatever its layout: every architecture through the seam that transformers gives it.

E source experts, T tokens, H hidden size, I expert intermediate size, P pre-activations of an expert, K experts per
token. Modules of transformers are typed ``Any``: what they hold is up to each architecture, and ``is_experts_module``
says which are understood.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

PROBE = "hcsmoe"

# (experts, tokens_TH, top_k_index_TK, top_k_weight_TK) -> routed output [T, H]
Observer = Callable[["Experts", Tensor, Tensor, Tensor], Tensor]


class Experts(ABC):
    """One layer's experts as functions of an expert number and a batch of tokens.

    Attributes:
        num_experts: E.
        is_affine: Whether the output is an affine function of the hidden activation. Then the mean output over tokens
            is the output of the mean activation, and the down projection need not run on every token.
        scales_input: Whether the router weight multiplies the expert's input instead of its output.
    """

    num_experts: int
    is_affine = True
    scales_input = False

    def hidden(self, expert: int, tokens_TH: Tensor) -> Tensor:
        """Hidden activation ``[T, I]`` after gating, in the dtype of the weights."""
        return self.gate(self.pre_activation(expert, tokens_TH))

    @abstractmethod
    def inputs(self, expert: int) -> tuple[Tensor, ...]:
        """Views ``[P_i, H]`` of the matrices whose products with a token, one after the other, are pre-activations."""

    @abstractmethod
    def pre_activation(self, expert: int, tokens_TH: Tensor) -> Tensor:
        """What goes into the gate or activation function: ``[T, P]``, P = I without a gate and 2I with one."""

    @abstractmethod
    def gate(self, pre_TP: Tensor) -> Tensor:
        """Hidden activation ``[T, I]`` from its pre-activations; every neuron depends on its own ones only."""

    @abstractmethod
    def project(self, expert: int, hidden_TI: Tensor) -> Tensor:
        """Expert output ``[T, H]`` from its hidden activation, computed in the dtype of ``hidden_TI``."""


class FusedExperts(Experts):
    """Experts of ``transformers.integrations.moe``: fused tensors, described by flags on the module."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.num_experts = module.down_proj.shape[0]
        self.is_affine = not module.has_post_expert_norm

    def _linear(self, name: str, expert: int, inputs: Tensor) -> Tensor:
        weight = getattr(self.module, name)[expert].to(inputs.dtype)
        bias = getattr(self.module, f"{name}_bias")[expert].to(inputs.dtype) if self.module.has_bias else None
        return F.linear(inputs, weight.T if self.module.is_transposed else weight, bias)

    @property
    def _incoming(self) -> str:
        return "gate_up_proj" if self.module.has_gate else "up_proj"

    def inputs(self, expert: int) -> tuple[Tensor, ...]:
        weight = getattr(self.module, self._incoming)[expert]
        return (weight.T if self.module.is_transposed else weight,)

    def pre_activation(self, expert: int, tokens_TH: Tensor) -> Tensor:
        return self._linear(self._incoming, expert, tokens_TH)

    def gate(self, pre_TP: Tensor) -> Tensor:
        return self.module._apply_gate(pre_TP) if self.module.has_gate else self.module.act_fn(pre_TP)

    def project(self, expert: int, hidden_TI: Tensor) -> Tensor:
        output_TH = self._linear("down_proj", expert, hidden_TI)
        return output_TH if self.is_affine else self.module.post_expert_norm(output_TH)


class DbrxExperts(Experts):
    """DBRX keeps its experts in three matrices ``[E * I, H]`` one below the other."""

    def __init__(self, module: Any) -> None:
        self.glu = module.mlp
        self.num_experts = self.glu.w1.shape[0] // module.ffn_hidden_size

    def _rows(self, name: str, expert: int) -> Tensor:
        return getattr(self.glu, name).unflatten(0, (self.num_experts, -1))[expert]

    def inputs(self, expert: int) -> tuple[Tensor, ...]:
        return self._rows("w1", expert), self._rows("v1", expert)

    def pre_activation(self, expert: int, tokens_TH: Tensor) -> Tensor:
        return torch.cat([tokens_TH @ rows.T for rows in self.inputs(expert)], dim=-1)

    def gate(self, pre_TP: Tensor) -> Tensor:
        gate_TI, up_TI = pre_TP.chunk(2, dim=-1)
        return self.glu.activation_fn(gate_TI) * up_TI

    def project(self, expert: int, hidden_TI: Tensor) -> Tensor:
        return hidden_TI @ self._rows("w2", expert).to(hidden_TI.dtype)


class Llama4Experts(Experts):
    """Llama 4 stores ``[E, H, 2I]`` and ``[E, I, H]``, and multiplies the expert's input by the router weight."""

    scales_input = True

    def __init__(self, module: Any) -> None:
        self.module = module
        self.num_experts = module.down_proj.shape[0]

    def inputs(self, expert: int) -> tuple[Tensor, ...]:
        return (self.module.gate_up_proj[expert].T,)

    def pre_activation(self, expert: int, tokens_TH: Tensor) -> Tensor:
        return tokens_TH @ self.module.gate_up_proj[expert]

    def gate(self, pre_TP: Tensor) -> Tensor:
        gate_TI, up_TI = pre_TP.chunk(2, dim=-1)
        return up_TI * self.module.act_fn(gate_TI)

    def project(self, expert: int, hidden_TI: Tensor) -> Tensor:
        return hidden_TI @ self.module.down_proj[expert].to(hidden_TI.dtype)


def is_experts_module(module: nn.Module) -> bool:
    """Whether a module holds routed experts that can be observed."""
    return hasattr(module, "_apply_gate") or type(module).__name__ in ("DbrxExperts", "Llama4TextExperts")


def experts_of(module: nn.Module) -> Experts:
    """The experts of a module for which ``is_experts_module`` holds."""
    match type(module).__name__:
        case "DbrxExperts":
            return DbrxExperts(module)
        case "Llama4TextExperts":
            return Llama4Experts(module)
        case _:
            return FusedExperts(module)


def _probe(module: Any, tokens_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """The experts implementation that transformers calls: hands the router's real decision to the observer."""
    observer: Observer = module.hcsmoe_observer
    return observer(FusedExperts(module), tokens_TH, index_TK, weight_TK)


def register_probe() -> None:
    """Makes the probe known to transformers; ``set_experts_implementation(PROBE)`` then switches it on."""
    ALL_EXPERTS_FUNCTIONS.register(PROBE, _probe)


def observe(block: Any, experts: Any, observer: Observer) -> None:
    """Sends everything that one MoE block's experts compute through ``observer``."""
    match type(experts).__name__:
        case "DbrxExperts":
            experts.forward = MethodType(_dbrx_forward(observer), experts)
        case "Llama4TextExperts":
            block.forward = MethodType(_llama4_forward(observer), block)
        case _:
            experts.hcsmoe_observer = observer


def stop_observing(block: Any, experts: Any) -> None:
    """Undoes ``observe``, so that nothing keeps the observer and what it remembers alive."""
    match type(experts).__name__:
        case "DbrxExperts":
            del experts.forward
        case "Llama4TextExperts":
            del block.forward
        case _:
            del experts.hcsmoe_observer


def _dbrx_forward(observer: Observer) -> Callable[..., Tensor]:
    def forward(experts: Any, states: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        return observer(DbrxExperts(experts), states.flatten(0, -2), index_TK, weight_TK).view_as(states)

    return forward


def _llama4_forward(observer: Observer) -> Callable[..., tuple[Tensor, Tensor]]:
    def forward(block: Any, states: Tensor) -> tuple[Tensor, Tensor]:
        tokens_TH = states.reshape(-1, states.shape[-1])
        scores_TE, logits_TE = block.router(tokens_TH)
        weight_TK, index_TK = torch.topk(scores_TE, block.top_k, dim=-1)
        routed_TH = observer(Llama4Experts(block.experts), tokens_TH, index_TK, weight_TK)
        return block.shared_expert(tokens_TH) + routed_TH, logits_TE

    return forward
