"""What neurons are compared by: Pearson correlations of activations, of weights, or of both."""

import numpy as np
import pytest
import torch
from tiny_experts import LAYOUTS, rows_of, sample_of, tiny_experts, view_of
from torch import Tensor

from hcsmoe_hub.methods.merging.neuron_features import correlation_features, correlations, standardise, weight_columns
from hcsmoe_hub.methods.merging.neurons import Neurons
from hcsmoe_hub.observation.sample import NeuronSample
from hcsmoe_hub.options import Features

MEMBERS = (0, 2, 5)


def cluster(model_type: str) -> tuple[Neurons, NeuronSample]:
    module = tiny_experts(model_type)
    group = {name: tensor[list(MEMBERS)] for name, tensor in rows_of(module).items()}
    return view_of(module)(group), sample_of(module)


def routed_activations(sample: NeuronSample) -> Tensor:
    """Activations ``[R, N]`` of all members on the tokens of each member, one member after the other."""
    inputs = []
    for member in MEMBERS:
        token, slot = torch.where(sample.index_TK == member)
        scale = sample.weight_TK[token, slot, None] if sample.experts.scales_input else 1.0
        inputs.append(sample.tokens_TH[token] * scale)
    return torch.cat([sample.hidden(member, torch.cat(inputs)) for member in MEMBERS], dim=1)


def pearson(values: Tensor) -> Tensor:
    with np.errstate(invalid="ignore"):
        return torch.from_numpy(np.nan_to_num(np.corrcoef(values.double().numpy().T)))


def found(neurons: Neurons, features: Features, sample: NeuronSample) -> Tensor:
    describe, is_seen = correlation_features(neurons, MEMBERS, features, sample)
    assert is_seen
    return correlations(describe, len(MEMBERS)).double()


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_activations_are_correlated_on_the_tokens_routed_to_the_members(model_type: str) -> None:
    neurons, sample = cluster(model_type)
    expected = pearson(routed_activations(sample))
    assert (found(neurons, Features.ACTIVATION, sample) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_weights_are_correlated_over_everything_that_a_neuron_holds(model_type: str) -> None:
    neurons, sample = cluster(model_type)
    parts = [part if part.dim() > 2 else part[..., None] for part in (*neurons.inputs, *neurons.outputs)]
    vectors = torch.cat([part.flatten(0, 1) for part in parts], dim=1)
    assert (found(neurons, Features.WEIGHT, sample) - pearson(vectors.T)).abs().max() < 1e-5


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_both_features_together_are_the_sum_of_their_correlations(model_type: str) -> None:
    neurons, sample = cluster(model_type)
    parts = [found(neurons, features, sample) for features in (Features.ACTIVATION, Features.WEIGHT)]
    assert (found(neurons, Features.ACTIVATION_WEIGHT, sample) - sum(parts)).abs().max() < 1e-5


@pytest.mark.parametrize("features", Features)
def test_correlations_are_exactly_symmetric(features: Features) -> None:
    neurons, sample = cluster("mixtral")
    matrix = found(neurons, features, sample)
    assert torch.equal(matrix, matrix.T)


@pytest.mark.parametrize("features", [Features.ACTIVATION, Features.ACTIVATION_WEIGHT])
@pytest.mark.parametrize("tokens", [0, 1])
def test_weights_stand_in_where_too_few_tokens_were_routed(features: Features, tokens: int) -> None:
    neurons, sample = cluster("mixtral")
    index_TK = torch.full_like(sample.index_TK, -1)
    index_TK[:tokens, 0] = MEMBERS[1]
    unseen = NeuronSample(
        experts=sample.experts, tokens_TH=sample.tokens_TH, index_TK=index_TK, weight_TK=sample.weight_TK
    )
    describe, is_seen = correlation_features(neurons, MEMBERS, features, unseen)
    assert not is_seen
    assert torch.equal(describe(1), standardise(weight_columns(neurons, 1)))


def test_weights_need_no_sample_and_activations_do() -> None:
    neurons, _ = cluster("mixtral")
    assert correlation_features(neurons, MEMBERS, Features.WEIGHT, None)[1]
    assert not correlation_features(neurons, MEMBERS, Features.ACTIVATION, None)[1]


def test_a_neuron_that_never_varies_correlates_with_nothing() -> None:
    values = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    values[:, 1] = 0.1
    columns = standardise(values)
    assert (columns.T @ columns)[1].tolist() == [0, 0, 0]
    assert columns.isfinite().all()


def test_a_row_that_counts_twice_is_a_row_that_is_there_twice() -> None:
    values = torch.randn(20, 4, generator=torch.Generator().manual_seed(1))
    count = torch.tensor([2.0] * 5 + [1.0] * 15)
    columns = standardise(values, count)
    expected = pearson(torch.cat([values, values[:5]]))
    assert ((columns.T @ columns).double() - expected).abs().max() < 1e-6


def test_a_large_mean_does_not_blur_the_correlation() -> None:
    values = torch.randn(100, 3, generator=torch.Generator().manual_seed(2)) + 1000
    columns = standardise(values)
    assert ((columns.T @ columns).double() - pearson(values)).abs().max() < 1e-6
