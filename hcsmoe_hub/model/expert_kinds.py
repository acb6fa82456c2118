"""The layouts of experts that are understood: the fused ones of transformers, and two of its classes that differ.

E source experts, T tokens, H hidden size, I expert intermediate size, P pre-activations of an expert, K experts per
token.
"""

from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from hcsmoe_hub.methods.merging.neurons import Neurons
from hcsmoe_hub.methods.refit.grouped import ExpertMatrices
from hcsmoe_hub.model.experts import Experts, Observer, brought
from hcsmoe_hub.model.neurons import sort_neurons
from hcsmoe_hub.model.transformers_seam import (
    apply_gate,
    has_plain_gate,
    is_fused_experts,
    is_silu,
    register_experts,
    switch_experts,
)

PROBE = "hcsmoe"


class FusedExperts(Experts):
    """Experts of ``transformers.integrations.moe``: fused tensors, described by flags on the module."""

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self.num_experts = module.down_proj.shape[0]
        self.is_affine = not module.has_post_expert_norm

    def _linear(self, name: str, expert: int, inputs: Tensor) -> Tensor:
        weight = brought(getattr(self.module, name)[expert], inputs)
        bias = brought(getattr(self.module, f"{name}_bias")[expert], inputs) if self.module.has_bias else None
        return F.linear(inputs, weight.T if self.module.is_transposed else weight, bias)

    @property
    def _incoming(self) -> str:
        return "gate_up_proj" if self.module.has_gate else "up_proj"

    def pre_activation(self, expert: int, tokens_TH: Tensor) -> Tensor:
        return self._linear(self._incoming, expert, tokens_TH)

    def gate(self, pre_TP: Tensor) -> Tensor:
        return apply_gate(self.module, pre_TP) if self.module.has_gate else self.module.act_fn(pre_TP)

    @property
    def is_silu_gated(self) -> bool:
        return self.module.has_gate and has_plain_gate(self.module) and is_silu(self.module.act_fn)

    def finish(self, output_RH: Tensor) -> Tensor:
        return output_RH if self.is_affine else self.module.post_expert_norm(output_RH)

    def project(self, expert: int, hidden_TI: Tensor) -> Tensor:
        return self.finish(self._linear("down_proj", expert, hidden_TI))

    def matrices(self, rows: Mapping[str, Tensor]) -> ExpertMatrices:
        incoming, outgoing = rows[self._incoming], rows["down_proj"]
        return ExpertMatrices(
            incoming=(incoming if self.module.is_transposed else incoming.mT,),
            incoming_bias=rows.get(f"{self._incoming}_bias"),
            outgoing=outgoing if self.module.is_transposed else outgoing.mT,
            outgoing_bias=rows.get("down_proj_bias"),
        )

    def neurons(self, rows: Mapping[str, Tensor]) -> Neurons:
        incoming, parts = self._incoming, 2 if self.module.has_gate else 1
        across, along = (2, 1) if self.module.is_transposed else (1, 2)
        return sort_neurons(
            rows,
            inputs={incoming: (across, parts), f"{incoming}_bias": (1, parts)},
            outputs={"down_proj": along},
            others=("down_proj_bias",),
            is_interleaved=not self.module.is_concatenated,
        )

    def observe(self, block: Any, observer: Observer) -> None:
        self.module.hcsmoe_observer = observer

    def stop(self, block: Any) -> None:
        del self.module.hcsmoe_observer


class DbrxExperts(Experts):
    """DBRX keeps its experts in three matrices ``[E * I, H]`` one below the other."""

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self.glu = module.mlp
        self.num_experts = self.glu.w1.shape[0] // module.ffn_hidden_size

    def _rows(self, name: str, expert: int) -> Tensor:
        return getattr(self.glu, name).unflatten(0, (self.num_experts, -1))[expert]

    def pre_activation(self, expert: int, tokens_TH: Tensor) -> Tensor:
        rows = (brought(self._rows(name, expert), tokens_TH) for name in ("w1", "v1"))
        return torch.cat([tokens_TH @ rows_IH.T for rows_IH in rows], dim=-1)

    def gate(self, pre_TP: Tensor) -> Tensor:
        gate_TI, up_TI = pre_TP.chunk(2, dim=-1)
        return self.glu.activation_fn(gate_TI) * up_TI

    def project(self, expert: int, hidden_TI: Tensor) -> Tensor:
        return hidden_TI @ brought(self._rows("w2", expert), hidden_TI)

    def neurons(self, rows: Mapping[str, Tensor]) -> Neurons:
        # All three are stored [E, I, H].
        return sort_neurons(rows, inputs={"mlp.w1": (1, 1), "mlp.v1": (1, 1)}, outputs={"mlp.w2": 1})

    def matrices(self, rows: Mapping[str, Tensor]) -> ExpertMatrices:
        return ExpertMatrices(incoming=(rows["mlp.w1"].mT, rows["mlp.v1"].mT), outgoing=rows["mlp.w2"])

    def observe(self, block: Any, observer: Observer) -> None:
        def forward(module: Any, states: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
            return observer(DbrxExperts(module), states.flatten(0, -2), index_TK, weight_TK).view_as(states)

        self.module.forward = MethodType(forward, self.module)

    def stop(self, block: Any) -> None:
        del self.module.forward


class Llama4Experts(Experts):
    """Llama 4 stores ``[E, H, 2I]`` and ``[E, I, H]``, and multiplies the expert's input by the router weight."""

    scales_input = True

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self.num_experts = module.down_proj.shape[0]

    def pre_activation(self, expert: int, tokens_TH: Tensor) -> Tensor:
        return tokens_TH @ brought(self.module.gate_up_proj[expert], tokens_TH)

    def gate(self, pre_TP: Tensor) -> Tensor:
        gate_TI, up_TI = pre_TP.chunk(2, dim=-1)
        return up_TI * self.module.act_fn(gate_TI)

    def project(self, expert: int, hidden_TI: Tensor) -> Tensor:
        return hidden_TI @ brought(self.module.down_proj[expert], hidden_TI)

    def neurons(self, rows: Mapping[str, Tensor]) -> Neurons:
        return sort_neurons(rows, inputs={"gate_up_proj": (2, 2)}, outputs={"down_proj": 1})

    def matrices(self, rows: Mapping[str, Tensor]) -> ExpertMatrices:
        return ExpertMatrices(incoming=(rows["gate_up_proj"],), outgoing=rows["down_proj"])

    def observe(self, block: Any, observer: Observer) -> None:
        def forward(block: Any, states: Tensor) -> tuple[Tensor, Tensor]:
            tokens_TH = states.reshape(-1, states.shape[-1])
            scores_TE, logits_TE = block.router(tokens_TH)
            weight_TK, index_TK = torch.topk(scores_TE, block.top_k, dim=-1)
            routed_TH = observer(Llama4Experts(block.experts), tokens_TH, index_TK, weight_TK)
            return block.shared_expert(tokens_TH) + routed_TH, logits_TE

        block.forward = MethodType(forward, block)

    def stop(self, block: Any) -> None:
        del block.forward


class UngatedExperts(FusedExperts):
    """Experts of encoder-decoder models, stacked by hcsmoe: transformers cannot let them compute in another way."""

    def observe(self, block: Any, observer: Observer) -> None:
        def forward(module: Any, tokens_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
            return observer(UngatedExperts(module), tokens_TH, index_TK, weight_TK)

        self.module.forward = MethodType(forward, self.module)

    def stop(self, block: Any) -> None:
        del self.module.forward


# Classes that compute in a way of their own; all others follow the experts interface of transformers.
KINDS: Mapping[str, type[Experts]] = {
    "DbrxExperts": DbrxExperts,
    "Llama4TextExperts": Llama4Experts,
    "StackedNllbExperts": UngatedExperts,
    "StackedSwitchExperts": UngatedExperts,
}


def is_experts_module(module: nn.Module) -> bool:
    """Whether a module holds routed experts of a layout that is understood."""
    return is_fused_experts(module) or type(module).__name__ in KINDS


def experts_of(module: nn.Module) -> Experts:
    """The experts of a module for which ``is_experts_module`` holds."""
    return KINDS.get(type(module).__name__, FusedExperts)(module)


def _probe(module: Any, tokens_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """What transformers calls instead of its experts: gives the router's real decision to the observer."""
    observer: Observer = module.hcsmoe_observer
    return observer(FusedExperts(module), tokens_TH, index_TK, weight_TK)


def register_probe() -> None:
    """Makes the probe known to transformers under the name ``PROBE``."""
    register_experts(PROBE, _probe)


def use_probe(model: PreTrainedModel) -> None:
    """Lets the experts of a model run through observers."""
    register_probe()
    switch_experts(model, PROBE)
