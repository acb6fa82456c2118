"""Which inputs the members of a cluster see, and what their neurons say to them."""

import pytest
import torch
from tiny_experts import sample_of, tiny_experts

from hcsmoe_hub.model.expert_kinds import experts_of
from hcsmoe_hub.observation.sample import NeuronSample

pytestmark = pytest.mark.usefixtures("one_thread")


def small_sample(model_type: str) -> NeuronSample:
    """Three tokens: to experts 0 and 2, to 2 and 1, and to 1 alone."""
    return NeuronSample(
        experts=experts_of(tiny_experts(model_type)),
        tokens_TH=torch.arange(3.0)[:, None].expand(3, 32) + 1,
        index_TK=torch.tensor([[0, 2], [2, 1], [1, -1]], dtype=torch.int16),
        weight_TK=torch.tensor([[0.5, 0.25], [0.75, 0.5], [1.0, 0.0]]),
    )


@pytest.mark.parametrize(
    ("members", "tokens", "counts"),
    [
        ((0,), [1], [1]),
        ((2,), [1, 2], [1, 1]),
        ((0, 2), [1, 2], [2, 1]),
        ((0, 1, 2), [1, 2, 3], [2, 2, 1]),
        ((3,), [], []),
    ],
)
def test_a_token_counts_once_for_every_member_it_is_routed_to(
    members: tuple[int, ...], tokens: list[int], counts: list[int]
) -> None:
    inputs_RH, count_R = small_sample("mixtral").routed_inputs(members)
    assert inputs_RH[:, 0].tolist() == tokens
    assert count_R.tolist() == counts


def test_a_token_is_scaled_for_every_member_where_the_router_scales_inputs() -> None:
    inputs_RH, count_R = small_sample("llama4_text").routed_inputs((0, 2))
    assert inputs_RH[:, 0].tolist() == [0.5, 0.25, 1.5]
    assert count_R.tolist() == [1, 1, 1]


def test_all_inputs_are_all_tokens_wherever_they_are_routed() -> None:
    assert small_sample("llama4_text").all_inputs()[:, 0].tolist() == [1, 2, 3]


def test_hidden_activations_are_those_of_the_expert_in_float32() -> None:
    module = tiny_experts("mixtral").to(torch.bfloat16)
    sample = sample_of(tiny_experts("mixtral"))
    inputs_RH = sample.all_inputs().bfloat16()
    narrow = NeuronSample(
        experts=experts_of(module), tokens_TH=inputs_RH, index_TK=sample.index_TK, weight_TK=sample.weight_TK
    )
    hidden_RI = narrow.hidden(3, inputs_RH)
    assert hidden_RI.dtype == torch.float32
    assert torch.equal(hidden_RI, experts_of(module).hidden(3, inputs_RH).float())
