"""Fix-Dom: every neuron joins the most correlated one of the dominant expert; groups of neurons become their mean."""

import pytest
import torch
from tiny_experts import LAYOUTS, rows_of, sample_of, tiny_experts, view_of

from hcsmoe_hub.methods.merging.fix_dom import fix_dom_groups
from hcsmoe_hub.methods.merging.neuron_features import correlation_features
from hcsmoe_hub.methods.merging.neurons import Neurons
from hcsmoe_hub.options import Features


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("model_type", LAYOUTS)
@pytest.mark.parametrize("dominant", [0, 1, 2])
def test_every_neuron_joins_the_most_correlated_one_of_the_dominant_expert(model_type: str, dominant: int) -> None:
    module = tiny_experts(model_type)
    members = (1, 3, 4)
    neurons = view_of(module)({name: tensor[list(members)] for name, tensor in rows_of(module).items()})
    describe, _ = correlation_features(neurons, members, Features.ACTIVATION, sample_of(module))
    groups = fix_dom_groups(describe, 3, dominant).view(3, neurons.size)
    for position in range(3):
        if position == dominant:
            assert groups[position].tolist() == list(range(neurons.size))
        else:
            correlation = describe(dominant).T @ describe(position)
            joined = correlation.gather(0, groups[position][None])
            assert (joined >= correlation).all()


def test_many_neurons_may_join_one_and_none_another() -> None:
    eye = torch.eye(3)
    groups = fix_dom_groups([eye, eye[:, [1, 1, 0]]].__getitem__, 2, 0)
    assert groups.tolist() == [0, 1, 2, 1, 1, 0]


def test_the_lowest_neuron_wins_among_equals() -> None:
    assert fix_dom_groups([torch.eye(3), torch.ones(3, 3)].__getitem__, 2, 0).tolist() == [0, 1, 2, 0, 0, 0]


def test_copies_in_another_order_join_themselves() -> None:
    features = random(40, 8, seed=0)
    features /= features.norm(dim=0)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    groups = fix_dom_groups([features[:, order], features].__getitem__, 2, 1)
    assert groups.tolist() == [*order.tolist(), *range(8)]


def two_experts(dtype: torch.dtype = torch.float32) -> Neurons:
    return Neurons(
        inputs=(random(2, 5, 4, seed=2).to(dtype), random(2, 5, seed=3).to(dtype)),
        outputs=(random(2, 4, 5, seed=4).to(dtype).transpose(1, 2),),
        others=(random(2, 4, seed=5).to(dtype),),
    )


def test_a_group_becomes_the_mean_of_its_neurons() -> None:
    neurons = two_experts()
    inputs, outputs = neurons.average(torch.tensor([0, 1, 2, 3, 4, 4, 0, 0, 3, 0]))
    for tensor, mean in zip((*neurons.inputs, *neurons.outputs), (*inputs, *outputs), strict=True):
        assert torch.allclose(mean[0], (tensor[0, 0] + tensor[1, 1] + tensor[1, 2] + tensor[1, 4]) / 4)
        assert torch.equal(mean[1], tensor[0, 1])
        assert torch.allclose(mean[3], (tensor[0, 3] + tensor[1, 3]) / 2)
        assert torch.allclose(mean[4], (tensor[0, 4] + tensor[1, 0]) / 2)


@pytest.mark.parametrize(
    ("dtype", "wide"), [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)]
)
def test_means_are_taken_in_float32_or_wider(dtype: torch.dtype, wide: torch.dtype) -> None:
    neurons = two_experts(dtype)
    inputs, outputs = neurons.average(torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3, 4]))
    for tensor, mean in zip((*neurons.inputs, *neurons.outputs), (*inputs, *outputs), strict=True):
        assert mean.dtype == wide
        assert torch.equal(mean, (tensor[0].to(wide) + tensor[1].to(wide)) / 2)
