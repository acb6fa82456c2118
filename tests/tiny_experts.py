"""The experts of one layer of a tiny model, for tests that need nothing else of it."""

from collections.abc import Mapping
from copy import deepcopy
from functools import cache
from typing import Any

import torch
from architectures import ENCODER_DECODER, EXPERTS, TOP_K, tiny_model
from torch import Tensor, nn

from hcsmoe_hub.methods.merging.neurons import NeuronView
from hcsmoe_hub.model.expert_kinds import experts_of, is_experts_module
from hcsmoe_hub.model.stacked_experts import stack_experts
from hcsmoe_hub.observation.sample import NeuronSample

# Every layout: fused, transposed, interleaved with biases, without a gate, two of their own, and stacked ones.
LAYOUTS = ("mixtral", "aria_text", "gpt_oss", "nemotron_h", "dbrx", "llama4_text", *ENCODER_DECODER)


@cache
def _template(model_type: str) -> Any:
    model = tiny_model(model_type)
    if model_type in ENCODER_DECODER:
        stack_experts(model)
    experts = next(module for module in model.modules() if is_experts_module(module))
    if model_type in ENCODER_DECODER:
        generator = torch.Generator().manual_seed(1)
        for parameter in experts.parameters():
            parameter.normal_(0, 0.15, generator=generator)
    return experts


def tiny_experts(model_type: str) -> Any:
    """The experts of one layer of a tiny model; a copy that may be changed."""
    return deepcopy(_template(model_type))


def rows_of(module: nn.Module) -> dict[str, Tensor]:
    """Tensors of the experts, experts first, in the memory of the module."""
    return {
        name: parameter.data.unflatten(0, (EXPERTS, -1)) if parameter.shape[0] > EXPERTS else parameter.data
        for name, parameter in module.named_parameters()
    }


def view_of(module: nn.Module) -> NeuronView:
    """How to look at tensors of this layout neuron by neuron."""
    return experts_of(module).neurons


def outputs_of(module: nn.Module, tokens_TH: Tensor) -> Tensor:
    """Output of every expert on every token, ``[E, T, H]``."""
    experts = experts_of(module)
    with torch.no_grad():
        return torch.stack([experts.project(e, experts.hidden(e, tokens_TH)) for e in range(EXPERTS)])


def load_rows(module: nn.Module, rows: Mapping[str, Tensor]) -> None:
    """Writes tensors of as many experts into the module."""
    for name, tensor in rows_of(module).items():
        tensor.copy_(rows[name])


def sample_of(module: nn.Module, tokens: int = 200, seed: int = 0) -> NeuronSample:
    """Random tokens, each routed to ``TOP_K`` random experts; every tenth to none."""
    numbers = torch.Generator().manual_seed(seed)
    hidden_size = view_of(module)(rows_of(module)).outputs[0].shape[2]
    index_TK = torch.rand(tokens, EXPERTS, generator=numbers).topk(TOP_K).indices
    index_TK[::10] = -1
    return NeuronSample(
        experts=experts_of(module),
        tokens_TH=torch.randn(tokens, hidden_size, generator=numbers),
        index_TK=index_TK,
        weight_TK=torch.rand(tokens, TOP_K, generator=numbers),
    )
