"""Matrices as a low-rank part plus a few whole rows."""

import pytest
import torch
from torch import Tensor

from hcsmoe_hub.methods.compress import Whitening, decompose, singular_values, stable_rank
from hcsmoe_hub.methods.compress.importance import most_important, row_importance
from hcsmoe_hub.methods.compress.low_rank import fit_left, whitened_svd


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uneven(inputs: int, *, seed: int = 0, rows: int = 200) -> Whitening:
    """Inputs of which some directions are a hundred times as large as others."""
    sizes_I = torch.logspace(0, 2, inputs, dtype=torch.float64)
    inputs_TI = noise(rows, inputs, seed=seed) * sizes_I
    return Whitening(inputs_TI.T @ inputs_TI)


def plain_svd(weight_OI: Tensor, rank: int) -> Tensor:
    left, values, right = torch.linalg.svd(weight_OI)
    return left[:, :rank] * values[:rank] @ right[:rank]


SHAPES = [(24, 40), (40, 24)]


# Low rank


@pytest.mark.parametrize("shape", SHAPES)
def test_a_whitened_decomposition_loses_less_output_than_a_plain_one(shape: tuple[int, int]) -> None:
    weight_OI, inputs = noise(*shape), uneven(shape[1])
    left_OR, right_RI = whitened_svd(weight_OI, inputs, 4)
    whitened = inputs.energy(weight_OI - left_OR @ right_RI)
    assert whitened < 0.5 * inputs.energy(weight_OI - plain_svd(weight_OI, 4))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_whitened_decomposition_is_the_best_of_its_rank(shape: tuple[int, int]) -> None:
    weight_OI, inputs = noise(*shape), uneven(shape[1])
    left_OR, right_RI = whitened_svd(weight_OI, inputs, 4)
    lost = torch.linalg.svdvals(weight_OI @ torch.linalg.cholesky(inputs.gram_II))[4:].square().sum()
    assert inputs.energy(weight_OI - left_OR @ right_RI) == pytest.approx(float(lost), rel=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_of_equally_large_inputs_it_is_the_plain_one(shape: tuple[int, int]) -> None:
    weight_OI = noise(*shape)
    left_OR, right_RI = whitened_svd(weight_OI, Whitening(torch.eye(shape[1])), 4)
    assert torch.allclose(left_OR @ right_RI, plain_svd(weight_OI, 4), atol=1e-6)
    assert torch.allclose(left_OR.norm(dim=0), right_RI.norm(dim=1))


@pytest.mark.parametrize("shape", SHAPES)
def test_least_squares_never_makes_it_worse(shape: tuple[int, int]) -> None:
    weight_OI, inputs = noise(*shape), uneven(shape[1])
    for seed, rank in enumerate((1, 4, 24)):
        left_OR, right_RI = noise(shape[0], rank, seed=seed), noise(rank, shape[1], seed=seed + 9)
        before = inputs.energy(weight_OI - left_OR @ right_RI)
        fitted = inputs.energy(weight_OI - fit_left(weight_OI, right_RI, inputs) @ right_RI)
        assert fitted <= before


# Rows


def test_the_most_important_rows_are_those_that_the_output_needs() -> None:
    residual_OI = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    importance_O = row_importance(residual_OI, torch.tensor([[1.0, 0.0], [0.0, 100.0]]))
    assert importance_O.tolist() == [0.5, 50.0, 0.0]
    assert most_important(importance_O, 1).tolist() == [1]
    assert most_important(torch.ones(4), 2).tolist() == [0, 1]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_matrix_of_low_rank_and_a_few_rows_is_recovered_exactly(shape: tuple[int, int]) -> None:
    low_OI = noise(shape[0], 3, seed=1) @ noise(3, shape[1], seed=2)
    rows_C = [2, 7, 11, 19]
    weight_OI = low_OI.clone()
    weight_OI[rows_C] += noise(4, shape[1], seed=3) * 3
    inputs = Whitening(noise(200, shape[1]).T @ noise(200, shape[1]))
    found = decompose(weight_OI, inputs, rank=3, rows=4)
    assert found.rows_C.tolist() == rows_C
    assert torch.allclose(found.dense(), weight_OI, atol=1e-6)


def test_kept_rows_lower_the_error_and_without_any_it_is_low_rank_alone() -> None:
    weight_OI, inputs = noise(24, 40), uneven(40)
    errors = [
        inputs.energy(weight_OI - decompose(weight_OI, inputs, rank=4, rows=rows).dense()) for rows in (0, 2, 8, 24)
    ]
    left_OR, right_RI = whitened_svd(weight_OI, inputs, 4)
    assert errors[0] == pytest.approx(inputs.energy(weight_OI - left_OR @ right_RI))
    assert errors[0] > errors[1] > errors[2] > errors[3] == pytest.approx(0, abs=1e-6)


def test_kept_rows_are_exact_but_for_rounding_and_the_others_are_of_low_rank() -> None:
    weight_OI, inputs = noise(24, 40), uneven(40)
    found = decompose(weight_OI, inputs, rank=4, rows=6, dtype=torch.bfloat16)
    assert {part.dtype for part in (found.left_OR, found.right_RI, found.sparse_CI)} == {torch.bfloat16}
    wide = found.left_OR.double() @ found.right_RI.double()
    assert torch.linalg.matrix_rank(wide) <= 4
    exact = (wide + torch.zeros_like(wide).index_add(0, found.rows_C, found.sparse_CI.double()))[found.rows_C]
    assert torch.allclose(exact, weight_OI[found.rows_C], rtol=0.01, atol=0.02)


def test_rounding_is_made_up_for() -> None:
    weight_OI, inputs = noise(24, 40), uneven(40)
    exact = decompose(weight_OI, inputs, rank=8, rows=0)
    rounded = decompose(weight_OI, inputs, rank=8, rows=0, dtype=torch.bfloat16)
    careless = exact.left_OR.to(torch.bfloat16).double() @ exact.right_RI.to(torch.bfloat16).double()
    found = rounded.left_OR.double() @ rounded.right_RI.double()
    assert inputs.energy(weight_OI - found) < inputs.energy(weight_OI - careless)


def test_a_matrix_whose_inputs_were_never_seen_is_decomposed_as_if_all_counted_the_same() -> None:
    weight_OI = noise(24, 40)
    found = decompose(weight_OI, Whitening(torch.zeros(40, 40)), rank=4, rows=0)
    assert torch.allclose(found.dense(), plain_svd(weight_OI, 4), atol=1e-6)


def test_factors_beyond_the_rank_of_a_matrix_do_no_harm() -> None:
    weight_OI = noise(24, 1) @ noise(1, 40)
    assert torch.allclose(decompose(weight_OI, uneven(40), rank=6, rows=0).dense(), weight_OI, atol=1e-6)
    assert not decompose(torch.zeros(24, 40), uneven(40), rank=6, rows=2).dense().any()


# Spectra


def test_the_stable_rank_counts_directions_of_equal_size() -> None:
    assert stable_rank(singular_values(torch.eye(5, 7))) == pytest.approx(5)
    assert stable_rank(singular_values(noise(5, 1) @ noise(1, 7))) == pytest.approx(1)
    assert stable_rank(torch.zeros(3)) == 0
    assert singular_values(torch.diag(torch.tensor([1.0, 3.0]))).tolist() == [3.0, 1.0]
