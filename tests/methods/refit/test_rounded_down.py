"""Down projections that make up for their own rounding."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from hcsmoe_hub.methods.refit.down_projections import fit_down, routed_output
from hcsmoe_hub.methods.refit.rounded_down import fit_rounded_down

TOKENS, HIDDEN, NEURONS, EXPERTS = 400, 12, 16, 3


@dataclass(frozen=True)
class Neurons:
    """Experts whose neurons are random functions of the tokens."""

    tokens_TH: Tensor
    index_TK: Tensor
    weight_TK: Tensor
    inputs_CHI: Tensor

    def hidden(self, expert: int, inputs_RH: Tensor) -> Tensor:
        return torch.nn.functional.silu(inputs_RH @ self.inputs_CHI[expert])


@pytest.fixture
def sample() -> Neurons:
    generator = torch.Generator().manual_seed(0)
    return Neurons(
        tokens_TH=torch.randn(TOKENS, HIDDEN, generator=generator),
        index_TK=torch.rand(TOKENS, EXPERTS, generator=generator).argsort(1)[:, :2],
        weight_TK=torch.rand(TOKENS, 2, generator=generator),
        inputs_CHI=torch.randn(EXPERTS, HIDDEN, NEURONS, generator=generator),
    )


def round_coarsely(values: Tensor) -> Tensor:
    return (values * 2).round() / 2


def error(sample: Neurons, down_CIH: Tensor, wanted_TH: Tensor) -> float:
    return float((routed_output(sample, down_CIH) - wanted_TH).norm() / wanted_TH.norm())


def test_pieces_are_rounded_and_closer_than_rounding_at_once(sample: Neurons) -> None:
    generator = torch.Generator().manual_seed(1)
    wanted_TH = torch.randn(TOKENS, HIDDEN, generator=generator).cumsum(1)
    start_CIH = torch.randn(EXPERTS, NEURONS, HIDDEN, generator=generator)
    at_once = round_coarsely(fit_down(sample, wanted_TH, start_CIH))
    down_CIH = start_CIH.clone()
    fit_rounded_down(sample, wanted_TH, down_CIH, round_down=round_coarsely, piece=4)
    assert torch.equal(down_CIH, round_coarsely(down_CIH))
    assert error(sample, down_CIH, wanted_TH) < error(sample, at_once, wanted_TH)


def test_one_piece_is_a_fit_that_is_rounded(sample: Neurons) -> None:
    wanted_TH = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1))
    start_CIH = torch.zeros(EXPERTS, NEURONS, HIDDEN)
    down_CIH = start_CIH.clone()
    fit_rounded_down(sample, wanted_TH, down_CIH, round_down=round_coarsely, piece=NEURONS)
    assert torch.equal(down_CIH, round_coarsely(fit_down(sample, wanted_TH, start_CIH)))
