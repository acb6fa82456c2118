"""Losses of a student: against definitions written out."""

import pytest
import torch

from hcsmoe_hub.methods.distil.losses import divergence, text_loss

B, L, V = 2, 3, 11


def logits(seed: int) -> torch.Tensor:
    return torch.randn(B, L, V, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_divergence_is_that_of_softened_distributions(temperature):
    student, teacher = logits(0), logits(1)
    q, p = (torch.softmax(each / temperature, -1) for each in (student, teacher))
    expected = (p * (p / q).log()).sum()
    assert float(divergence(student, teacher, temperature)) == pytest.approx(float(expected), rel=1e-5)


def test_a_student_that_equals_its_teacher_diverges_by_nothing():
    assert float(divergence(logits(0), logits(0), 2.0)) == pytest.approx(0.0, abs=1e-6)


def test_the_loss_on_a_text_is_that_of_every_next_token():
    student = logits(0)
    ids = torch.randint(0, V, (B, L), generator=torch.Generator().manual_seed(2))
    expected = -sum(
        float(torch.log_softmax(student[row, place], -1)[ids[row, place + 1]])
        for row in range(B)
        for place in range(L - 1)
    )
    assert float(text_loss(student, ids[:, 1:])) == pytest.approx(expected, rel=1e-5)
