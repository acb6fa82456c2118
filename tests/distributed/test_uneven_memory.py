"""Memory that runs out on one of two ranks does not bring them out of step, and large tensors meet in pieces."""

import pytest
import torch
from rank_pair import RankPair
from uneven_pair import exchange_in_pieces, fit_part, fitted, normal


@pytest.mark.parametrize("failing", [0, 1])
def test_a_fit_goes_on_with_less_memory_on_one_rank(pair: RankPair, failing: int) -> None:
    expected = fitted(slice(None))
    for answer in pair.convert(("", failing), by=fit_part):
        torch.testing.assert_close(answer.report, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("piece", [8, 40, 1 << 20])
def test_tensors_are_exchanged_in_pieces_of_any_size(pair: RankPair, piece: int) -> None:
    for answer in pair.convert(("", piece), by=exchange_in_pieces):
        summed, rows, own = answer.report
        torch.testing.assert_close(summed, 3 * normal(7, 5).T)
        assert torch.equal(rows, normal(9, 3).to(torch.bfloat16))
        assert torch.equal(own, normal(4, 6).T)
