"""The view of experts neuron by neuron is right for every architecture: its order of neurons is free."""

import pytest
import torch
from architectures import EXPERTS, SUPPORTED
from tiny_experts import LAYOUTS, outputs_of, rows_of, tiny_experts, view_of

from hcsmoe_hub.errors import UnsupportedModelError
from hcsmoe_hub.model.expert_kinds import experts_of

pytestmark = pytest.mark.usefixtures("one_thread")

# Inputs, outputs and other tensors of an expert.
PARTS = {
    "mixtral": (2, 1, 0),
    "aria_text": (2, 1, 0),
    "gpt_oss": (4, 1, 1),
    "nemotron_h": (1, 1, 0),
    "dbrx": (2, 1, 0),
    "llama4_text": (2, 1, 0),
    "nllb-moe": (2, 1, 1),
    "switch_transformers": (1, 1, 0),
}


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_reordering_neurons_reorders_activations_and_leaves_outputs(model_type: str) -> None:
    module = tiny_experts(model_type)
    neurons = view_of(module)(rows_of(module))
    tokens_TH = torch.randn(9, neurons.outputs[0].shape[2], generator=torch.Generator().manual_seed(0))
    expected = outputs_of(module, tokens_TH)
    orders = [torch.randperm(neurons.size, generator=torch.Generator().manual_seed(e)) for e in range(EXPERTS)]
    with torch.no_grad():
        hidden_TI = experts_of(module).hidden(1, tokens_TH)
        for expert, order_I in enumerate(orders):
            neurons.permute(expert, order_I)
        assert torch.allclose(experts_of(module).hidden(1, tokens_TH), hidden_TI[:, orders[1]], rtol=1e-5, atol=1e-6)
    assert not torch.equal(orders[1], torch.arange(neurons.size))
    assert expected.abs().max() > 1e-3
    assert torch.allclose(outputs_of(module, tokens_TH), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_every_number_of_the_experts_is_seen_exactly_once(model_type: str) -> None:
    module = tiny_experts(model_type)
    rows = rows_of(module)
    neurons = view_of(module)(rows)
    assert (len(neurons.inputs), len(neurons.outputs), len(neurons.others)) == PARTS[model_type]
    for tensor in rows.values():
        tensor.zero_()
    for view in (*neurons.inputs, *neurons.outputs, *neurons.others):
        view += 1
    assert all((tensor == 1).all() for tensor in rows.values())


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_neurons_lie_in_the_second_dimension(model_type: str) -> None:
    neurons = view_of(module := tiny_experts(model_type))(rows_of(module))
    for view in (*neurons.inputs, *neurons.outputs):
        assert view.shape[:2] == (EXPERTS, neurons.size)
    assert neurons.count == EXPERTS
    assert neurons.size == experts_of(module).hidden(0, torch.zeros(1, neurons.outputs[0].shape[2])).shape[1]


@pytest.mark.parametrize("model_type", LAYOUTS)
@pytest.mark.parametrize("count", [1, 4])
def test_any_number_of_experts_can_be_looked_at(model_type: str, count: int) -> None:
    module = tiny_experts(model_type)
    rows = {name: tensor[:count] for name, tensor in rows_of(module).items()}
    some, all_of_them = view_of(module)(rows), view_of(module)(rows_of(module))
    assert some.count == count
    for part, whole in zip((*some.inputs, *some.outputs), (*all_of_them.inputs, *all_of_them.outputs), strict=True):
        assert torch.equal(part, whole[:count])


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_a_tensor_without_a_known_place_is_refused(model_type: str) -> None:
    module = tiny_experts(model_type)
    with pytest.raises(UnsupportedModelError, match="inner_scale"):
        view_of(module)({**rows_of(module), "inner_scale": torch.ones(EXPERTS, 24)})
