"""The choice among the shapes that meet a target: fewer experts where they repeat, narrower ones where neurons idle."""

import torch

from hcsmoe_hub.methods.clustering import LossTable, NeuronEnergies, loss_table
from hcsmoe_hub.options import Target
from hcsmoe_hub.planning.expert_shape import ExpertShape
from hcsmoe_hub.planning.target import Candidate, TargetPlan, file_label

EXPERTS, NEURONS = 4, 8


def planned() -> TargetPlan:
    """Half of the experts, half of the neurons, or something of both."""
    shapes = [(4, 4), (3, 5), (2, 8)]
    candidates = [
        Candidate(shape=ExpertShape(experts=experts, width=width), parameters=1, active=1, weights_bytes=1, ratio=0.5)
        for experts, width in shapes
    ]
    return TargetPlan(target=Target(ratio=0.5), candidates=tuple(candidates))


def table(own_UI: torch.Tensor, places: tuple[int, ...]) -> LossTable:
    harm_UUI = torch.zeros(len(own_UI), *own_UI.shape)
    plan = planned()
    return loss_table(NeuronEnergies.of(own_UI, harm_UUI, places), plan.experts, plan.widths)


def chosen(*tables: LossTable) -> tuple[int, int]:
    """K and W of the choice."""
    found = planned().decided(dict(enumerate(tables))).chosen
    assert found is not None
    return found.shape.experts, found.shape.width


def test_experts_that_repeat_each_other_become_fewer() -> None:
    assert chosen(table(torch.ones(2, NEURONS), (0, 0, 1, 1))) == (2, 8)


def test_experts_whose_neurons_do_nothing_become_narrower() -> None:
    own_UI = torch.ones(EXPERTS, NEURONS)
    own_UI[:, 4:] = 0
    assert chosen(table(own_UI, (0, 1, 2, 3))) == (4, 4)


def test_a_choice_is_open_until_the_model_has_run() -> None:
    assert planned().chosen is None
    assert planned().record()["chosen"] is None
    assert planned().shape.experts == 4


def test_tables_of_another_target_leave_the_choice_open() -> None:
    other = LossTable(experts=(4,), widths=(8,), lost_KW=torch.zeros(1, 1).double().numpy())
    assert planned().decided({0: other}).chosen is None


def test_targets_are_short_in_file_names() -> None:
    targets = [Target(size="24GB"), Target(parameters="16B"), Target(active="2B"), Target(ratio=0.5)]  # type: ignore[arg-type]
    assert [file_label(target) for target in targets] == ["24.0GB", "16.00B", "2.00B-active", "0.5"]
