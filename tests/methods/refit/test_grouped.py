"""Products of sorted tokens with the matrices of their experts: exact, differentiable, and blind to padding."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hcsmoe_hub.methods.refit.grouped import TrainedMatrix, Visits, product, silu_gate

TOKENS, TOP_K, EXPERTS, HIDDEN, WIDTH = 50, 2, 4, 8, 16


def choices() -> tuple[Tensor, Tensor]:
    """Choices of a router that never takes expert 2 and sends some tokens nowhere, and their weights."""
    numbers = torch.Generator().manual_seed(0)
    index = torch.tensor([-1, 0, 1, 3])[torch.randint(4, (TOKENS, TOP_K), generator=numbers)]
    return index, torch.where(index < 0, 0, torch.rand(TOKENS, TOP_K, generator=numbers))


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


KINDS = {
    "on the host": Visits.on_host,
    "without padding": lambda index, experts: Visits.on_host(index, experts, multiple=1),
    "on the device": Visits.on_device,
}


def summed(visits: Visits, values: Tensor, weight: Tensor, matrix: TrainedMatrix) -> Tensor:
    """Router-weighted products added up by token, ``[T, Y]``."""
    rows = product(visits, values[visits.token_R], matrix) * visits.weights(weight)
    return torch.zeros(len(values), rows.shape[1]).index_add(0, visits.token_R, rows)


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_one_product_after_the_other(kind: str) -> None:
    index, weight = choices()
    values, matrices = random(TOKENS, HIDDEN, seed=1), random(EXPERTS, HIDDEN, WIDTH, seed=2)
    expected_inputs = [tensor.clone().requires_grad_() for tensor in (values, matrices, weight)]
    x, m, w = expected_inputs
    expected = sum(torch.einsum("th,thy->ty", x, m[index[:, k]]) * w[:, k, None] for k in range(TOP_K))
    expected.square().sum().backward()

    anchor, gradient = torch.zeros(1, requires_grad=True), torch.full_like(matrices, torch.nan)
    y, v = values.clone().requires_grad_(), weight.clone().requires_grad_()
    trained = TrainedMatrix(values_CXY=matrices, gradient_CXY=gradient, anchor=anchor)
    found = summed(KINDS[kind](index, EXPERTS), y, v, trained)
    found.square().sum().backward()

    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, m.grad)
    torch.testing.assert_close(y.grad, x.grad)
    is_routed = index >= 0
    torch.testing.assert_close(v.grad[is_routed], w.grad[is_routed])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_parts_of_a_step_add_up(kind: str) -> None:
    index, weight = choices()
    values, matrices = random(TOKENS, HIDDEN, seed=1), random(EXPERTS, HIDDEN, WIDTH, seed=2)
    anchor = torch.zeros(1, requires_grad=True)

    def gradient(parts: list[slice]) -> Tensor:
        trained = TrainedMatrix(values_CXY=matrices, gradient_CXY=torch.full_like(matrices, torch.nan), anchor=anchor)
        for number, part in enumerate(parts):
            visits = replace(KINDS[kind](index[part], EXPERTS), adds=number > 0)
            summed(visits, values[part], weight[part], trained).square().sum().backward()
        return trained.gradient_CXY

    whole, parts = gradient([slice(None)]), gradient([slice(20), slice(20, 21), slice(21, None)])
    torch.testing.assert_close(parts, whole)


def test_rows_are_sorted_by_expert_and_padded_by_expert() -> None:
    index, weight = choices()
    visits = Visits.on_host(index, EXPERTS, multiple=32)
    counts = [int((index == expert).sum()) for expert in range(EXPERTS)]
    assert [end - start for start, end in zip([0, *visits.ends], visits.ends, strict=False)] == [
        -(-count // 32) * 32 for count in counts
    ]
    assert visits.expert_R.tolist() == sorted(visits.expert_R.tolist())
    is_padding = visits.visit_R == index.numel()
    assert int((~is_padding).sum()) == sum(counts)
    assert torch.equal(index.flatten()[visits.visit_R[~is_padding]], visits.expert_R[~is_padding])
    assert not visits.weights(weight)[is_padding].any()


def test_a_router_that_chooses_nothing_leaves_no_rows() -> None:
    index, weight = torch.full((3, 2), -1), torch.zeros(3, 2)
    gradient = torch.full((EXPERTS, HIDDEN, WIDTH), torch.nan)
    trained = TrainedMatrix(
        values_CXY=random(EXPERTS, HIDDEN, WIDTH, seed=2),
        gradient_CXY=gradient,
        anchor=torch.zeros(1, requires_grad=True),
    )
    found = summed(Visits.on_host(index, EXPERTS), random(3, HIDDEN, seed=1), weight, trained)
    found.sum().backward()
    assert not found.any()
    assert not gradient.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_is_that_of_plain_operations(dtype: torch.dtype) -> None:
    one = random(20, 2 * WIDTH, seed=3).to(dtype).requires_grad_()
    other = one.detach().clone().requires_grad_()
    gate, up = other.chunk(2, dim=-1)
    expected, found = torch.nn.functional.silu(gate) * up, silu_gate(one)
    upstream = random(20, WIDTH, seed=4).to(dtype)
    expected.backward(upstream)
    found.backward(upstream)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(one.grad, other.grad)
