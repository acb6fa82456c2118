"""The divergence from the most likely tokens and the mass of the others, next to that over the whole vocabulary."""

import math

import pytest
import torch
from torch import Tensor

from hcsmoe_hub.methods.distil.top_k import keep_top_k, top_k_divergence
from hcsmoe_hub.methods.quality.agreement import divergence

V = 40


def logits(seed: int) -> Tensor:
    return 3 * torch.randn(2, 5, V, generator=torch.Generator().manual_seed(seed))


def measured(student: Tensor, teacher: Tensor, count: int, temperature: float) -> Tensor:
    kept = keep_top_k(teacher, count, temperature)
    return top_k_divergence(student / temperature, kept.values / temperature, kept.tokens, kept.warm_rest)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_with_all_tokens_it_is_the_divergence_over_the_vocabulary(temperature):
    student, teacher = logits(0), logits(1)
    expected = divergence(student.double() / temperature, teacher.double() / temperature)
    torch.testing.assert_close(measured(student, teacher, V, temperature).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("count", [1, 7, V - 1])
def test_it_is_the_sum_over_the_kept_tokens_and_one_class_for_all_others(count, temperature):
    student, teacher = logits(2), logits(3)
    p, q = ((each.double() / temperature).softmax(-1) for each in (teacher, student))
    tokens = teacher.topk(count).indices
    p, q = (torch.cat([each.gather(-1, tokens), 1 - each.gather(-1, tokens).sum(-1, True)], -1) for each in (p, q))
    expected = (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(measured(student, teacher, count, temperature).double(), expected, rtol=1e-4, atol=1e-5)


def test_it_grows_with_the_number_of_kept_tokens_up_to_the_whole_divergence():
    student, teacher = logits(4), logits(5)
    found = [float(measured(student, teacher, count, 2.0).sum()) for count in (1, 5, 20, V)]
    assert found == sorted(found)
    assert found[0] > 0


def test_the_rest_at_temperature_one_is_the_mass_of_the_tokens_left_out():
    teacher = logits(6)
    kept = keep_top_k(teacher, 3, 2.0)
    expected = 1 - teacher.softmax(-1).topk(3).values.sum(-1)
    torch.testing.assert_close(kept.rest.exp(), expected, rtol=1e-4, atol=1e-6)


def test_a_student_that_agrees_has_no_divergence_and_no_gradient():
    teacher = logits(7)
    student = teacher.clone().requires_grad_()
    found = measured(student, teacher, 6, 2.0)
    found.sum().backward()
    torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-6)
    torch.testing.assert_close(student.grad, torch.zeros_like(student), rtol=0, atol=1e-6)


def test_the_gradient_spreads_the_class_of_the_others_as_the_student_does():
    teacher, student = logits(8), logits(9).requires_grad_()
    measured(student, teacher, 4, 1.0).sum().backward()
    p, q = teacher.softmax(-1), student.detach().softmax(-1)
    tokens = teacher.topk(4).indices
    kept = torch.zeros_like(p).scatter(-1, tokens, 1.0)
    q_rest, p_rest = ((each * (1 - kept)).sum(-1, True) for each in (q, p))
    expected = q - kept * p - (1 - kept) * p_rest * q / q_rest
    torch.testing.assert_close(student.grad, expected, rtol=1e-4, atol=1e-5)


def test_a_teacher_that_is_certain_gives_a_finite_divergence_and_gradient():
    teacher = torch.full((1, V), -300.0)
    teacher[0, 3] = 300.0
    student = logits(10)[0, :1].requires_grad_()
    found = measured(student, teacher, 2, 1.0)
    found.sum().backward()
    assert math.isclose(float(found.detach()), -float(student.detach().log_softmax(-1)[0, 3]), rel_tol=1e-5)
    assert bool(student.grad.isfinite().all())
