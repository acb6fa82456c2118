"""The observers by hand: what they add up, what they leave out, and which rows an expert sees.

T tokens, H hidden size, I hidden activations of an expert.
"""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from hcsmoe_hub.methods.merging.neurons import Neurons
from hcsmoe_hub.methods.refit.grouped import ExpertMatrices
from hcsmoe_hub.model.experts import Experts, Observer
from hcsmoe_hub.observation.calibration_observer import CalibrationObserver, mean_outputs
from hcsmoe_hub.observation.observers import (
    ROW_MULTIPLE,
    RoutedObserver,
    RouterObserver,
    SampleObserver,
    SubsetObserver,
    TiedObserver,
)
from hcsmoe_hub.observation.statistics import ExpertStatistics

pytestmark = pytest.mark.usefixtures("one_thread")


class Plain(Experts):
    """Expert e turns x into (e + 1) * x + 100 * e, in two steps."""

    num_experts = 3

    def __init__(self) -> None:
        self.rows: list[int] = []

    def inputs(self, expert: int) -> tuple[Tensor, ...]:
        return (torch.full((1, 1), expert + 1.0),)

    def pre_activation(self, expert: int, tokens_TH: Tensor) -> Tensor:
        self.rows.append(len(tokens_TH))
        return (expert + 1) * tokens_TH

    def gate(self, pre_TP: Tensor) -> Tensor:
        return pre_TP

    def project(self, expert: int, hidden_TI: Tensor) -> Tensor:
        return hidden_TI + 100 * expert

    def neurons(self, rows: Mapping[str, Tensor]) -> Neurons:
        raise AssertionError("observers run experts and look at no neurons")

    def matrices(self, rows: Mapping[str, Tensor]) -> ExpertMatrices:
        raise AssertionError("observers run experts and look at no matrices")

    def observe(self, block: Any, observer: Observer) -> None:
        raise AssertionError("observers are called by these tests themselves")

    def stop(self, block: Any) -> None:
        raise AssertionError("observers are called by these tests themselves")


class Curved(Plain):
    """A square after the projection, which no mean may be moved across."""

    is_affine = False

    def project(self, expert: int, hidden_TI: Tensor) -> Tensor:
        return super().project(expert, hidden_TI).square()


class Scaled(Plain):
    """The router weight multiplies the input."""

    scales_input = True


TOKENS = torch.tensor([[1.0], [2.0], [3.0]])


def look(experts: Experts, index: list[list[int]], weight: list[list[float]]) -> tuple[Tensor, CalibrationObserver]:
    observer = CalibrationObserver(ExpertStatistics.empty(experts.num_experts))
    return observer(experts, TOKENS, torch.tensor(index), torch.tensor(weight)), observer


def test_outputs_are_weighted_and_summed_by_hand() -> None:
    output, observer = look(Plain(), [[0, 1], [2, 1], [0, 2]], [[0.5, 0.25], [1.0, 0.5], [2.0, 1.0]])
    expected = [[0.5 * 1 + 0.25 * 102], [206 + 0.5 * 104], [2 * 3 + 209]]
    assert output.tolist() == expected
    assert observer.outputs[0].tolist() == expected
    assert observer.statistics.saliency_E.tolist() == [0.5 * 1 + 2 * 3, 25.5 + 52, 206 + 209]


def test_a_weight_of_zero_is_no_choice() -> None:
    output, observer = look(Plain(), [[0, 1], [0, 1], [0, 2]], [[1.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    assert output.tolist() == [[1], [2 + 104], [3]]
    assert observer.top_k[0].tolist() == [[0, -1], [0, 1], [0, -1]]
    assert observer.statistics.usage_E.tolist() == [3, 1, 0]


def test_an_index_beyond_the_experts_is_no_choice() -> None:
    output, observer = look(Plain(), [[0, 3], [3, 4], [7, 2]], [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    assert output.tolist() == [[1], [0], [209]]
    assert observer.top_k[0].tolist() == [[0, -1], [-1, -1], [-1, 2]]
    assert observer.statistics.usage_E.tolist() == [1, 0, 1]
    assert observer.statistics.saliency_E.tolist() == [1, 0, 209]


@pytest.mark.parametrize("kind", [Plain, Curved, Scaled])
def test_features_cover_all_tokens_wherever_they_were_routed(kind: type[Plain]) -> None:
    experts = kind()
    _, observer = look(experts, [[0], [0], [0]], [[0.1], [0.2], [0.3]])
    _, elsewhere = look(experts, [[1], [2], [5]], [[0.5], [0.0], [1.0]])
    means = mean_outputs(experts, observer.statistics)
    outputs = [experts.project(expert, experts.hidden(expert, TOKENS)) for expert in range(3)]
    assert means.flatten().tolist() == pytest.approx([float(output.mean()) for output in outputs])
    assert torch.equal(mean_outputs(experts, elsewhere.statistics), means)


def test_a_router_weight_that_scales_the_input_does_not_scale_the_output() -> None:
    output, _ = look(Scaled(), [[1], [1], [1]], [[0.5], [0.5], [0.5]])
    assert output.tolist() == [[100 + 1], [100 + 2], [100 + 3]]


def test_watching_the_routing_alone_runs_an_expert_on_its_own_tokens_only() -> None:
    experts = Plain()
    observer = RoutedObserver()
    output = observer(experts, TOKENS, torch.tensor([[0], [0], [2]]), torch.ones(3, 1))
    assert output.tolist() == [[1], [2], [209]]
    # Two of three experts have tokens; their rows are filled up to a multiple, which must not show in the output.
    assert experts.rows == [ROW_MULTIPLE, ROW_MULTIPLE]


def test_both_observers_compute_the_same() -> None:
    tokens = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    index = torch.randint(0, 4, (200, 2), generator=torch.Generator().manual_seed(1))
    weight = torch.rand(200, 2, generator=torch.Generator().manual_seed(2))
    routed, calibration = RoutedObserver(), CalibrationObserver(ExpertStatistics.empty(3))
    assert torch.equal(routed(Plain(), tokens, index, weight), calibration(Plain(), tokens, index, weight))
    assert torch.equal(routed.top_k[0], calibration.top_k[0])


def test_sums_of_half_precision_outputs_are_rounded_once() -> None:
    # 256 + 1 + 1 in bfloat16, one by one, would stay 256.
    class Constant(Plain):
        num_experts = 3

        def project(self, expert: int, hidden_TI: Tensor) -> Tensor:
            return torch.full_like(hidden_TI, (256, 1, 1)[expert])

    index, weight = torch.tensor([[0, 1, 2]]), torch.ones(1, 3, dtype=torch.bfloat16)
    output = RoutedObserver()(Constant(), torch.ones(1, 1, dtype=torch.bfloat16), index, weight)
    assert output.dtype == torch.bfloat16
    assert output.tolist() == [[258]]


def test_a_tied_observer_leads_every_choice_to_the_expert_of_its_cluster() -> None:
    index, weight = torch.tensor([[0, 3], [2, 1], [4, 9]]), torch.tensor([[1.0, 2.0], [1.0, 0.0], [1.0, 1.0]])
    observer = TiedObserver((0, 1, 1, 2), 3)
    output = observer(Plain(), TOKENS, index, weight)
    direct = RoutedObserver()
    # 4 and 9 are no experts of the source, so they must not become any of the result.
    expected = direct(Plain(), TOKENS, torch.tensor([[0, 2], [1, 1], [3, 3]]), weight)
    assert torch.equal(output, expected)
    assert observer.top_k[0].tolist() == direct.top_k[0].tolist() == [[0, 2], [1, -1], [-1, -1]]


def test_two_choices_of_one_cluster_add_up() -> None:
    observer = TiedObserver((0, 1, 1), 2)
    output = observer(Plain(), TOKENS[:1], torch.tensor([[1, 2]]), torch.tensor([[0.5, 0.25]]))
    alone = RoutedObserver()(Plain(), TOKENS[:1], torch.tensor([[1]]), torch.tensor([[0.75]]))
    assert torch.equal(output, alone)


def test_a_sample_observer_remembers_what_the_experts_were_given() -> None:
    observer = SampleObserver()
    index, weight = torch.tensor([[0], [1], [7]]), torch.tensor([[0.5], [2.0], [1.0]])
    output = observer(Plain(), TOKENS, index, weight)
    assert torch.equal(output, RoutedObserver()(Plain(), TOKENS, index, weight))
    assert torch.equal(observer.tokens[0], TOKENS)
    assert torch.equal(observer.weights[0], weight)
    assert observer.top_k[0].tolist() == [[0], [1], [-1]]


def test_a_router_observer_runs_no_expert_and_remembers_the_decision() -> None:
    experts, observer = Plain(), RouterObserver()
    index, weight = torch.tensor([[0], [1], [7]]), torch.tensor([[0.5], [0.0], [1.0]])
    output = observer(experts, TOKENS, index, weight)
    assert (output.tolist(), experts.rows) == ([[0], [0], [0]], [])
    assert observer.top_k[0].tolist() == [[0], [-1], [-1]]
    assert torch.equal(observer.weights[0], weight)
    observer.on_router(TOKENS, index, weight)
    assert (observer.inputs, observer.logits, observer.extra) == ([TOKENS], [index], [weight])


def test_a_subset_observer_adds_up_outputs_that_are_known_already() -> None:
    outputs = torch.stack([Plain().project(expert, Plain().hidden(expert, TOKENS)) for expert in range(3)])
    # Row 0 of the smaller router stands for expert 0, row 1 for expert 2; 2 and 5 are no rows of it.
    index, weight = torch.tensor([[0, 1], [1, 2], [5, 0]]), torch.tensor([[1.0, 0.5], [2.0, 1.0], [1.0, 0.0]])
    found = SubsetObserver(outputs, (0, 2))(Plain(), TOKENS, index, weight)
    expected = RoutedObserver()(Plain(), TOKENS, torch.tensor([[0, 2], [2, 3], [3, 0]]), weight)
    assert torch.equal(found, expected)
