"""Training towards another model's logits: nearer on text it has not seen, the same twice, dropped where it harms."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from hcsmoe_hub.methods.distil.text import Pieces, make_pieces
from hcsmoe_hub.methods.distil.training import (
    LEAST_RATE,
    MOST_RATE,
    VISITED_TOKENS,
    Pair,
    Progress,
    Trained,
    Trainer,
    Training,
    divergence,
    rates_for,
    step_count,
    step_pieces,
)

pytestmark = pytest.mark.usefixtures("one_thread")

V, H = 11, 6


class Bigrams(nn.Module):
    """Logits of the next token from the current one; an embedding that no token uses has no gradient."""

    def __init__(self, noise: float) -> None:
        super().__init__()
        numbers = torch.Generator().manual_seed(0)
        other = torch.Generator().manual_seed(1)
        self.rows = nn.Parameter(torch.randn(V, H, generator=numbers))
        self.head = nn.Parameter(torch.randn(H, V, generator=numbers))
        self.unused = nn.Parameter(torch.randn(3, generator=numbers))
        for parameter in self.parameters():
            parameter.data += noise * torch.randn(parameter.shape, generator=other)

    def forward(self, ids_BL: Tensor) -> Tensor:
        return self.rows[ids_BL] @ self.head


@dataclass
class Case:
    """A student, its text, and what is trained of it."""

    student: Bigrams
    pieces: Pieces
    trained: list[Trained]

    def run(self, rate: float = 0.01, seed: int = 0) -> Training:
        return self.trainer(rate, seed).run()

    def trainer(self, rate: float = 0.01, seed: int = 0) -> Trainer:
        teacher = Bigrams(0)
        return Trainer(Pair(student=self.student, teacher=teacher), self.trained, self.pieces, rate=rate, seed=seed)


def make_case(dtype: torch.dtype = torch.float32, domains: Sequence[str] = ("",)) -> Case:
    student = Bigrams(0.3)
    ids = torch.randint(0, V, (32, 16), generator=torch.Generator().manual_seed(2))
    pieces = make_pieces(ids, list(domains) * (32 // len(domains)))
    trained = [Trained(parameter=each, start=each.detach().to(dtype, copy=True)) for each in student.parameters()]
    return Case(student, pieces, trained)


@pytest.fixture(autouse=True)
def many_small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hcsmoe_hub.methods.distil.training.STEP_TOKENS", 32)
    monkeypatch.setattr("hcsmoe_hub.methods.distil.training.MOST_PASSES", 8)


def test_the_divergence_is_that_of_the_distributions() -> None:
    student, teacher = torch.randn(2, 3, V), torch.randn(2, 3, V)
    p, q = teacher.softmax(-1), student.softmax(-1)
    assert float(divergence(student, teacher)) == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-5)
    assert float(divergence(teacher, teacher)) == pytest.approx(0, abs=1e-6)


def test_training_brings_every_domain_nearer_on_text_that_it_has_not_seen() -> None:
    done = make_case(domains=("prose", "code")).run()
    assert done.kept > 0
    assert done.before.keys() == done.after.keys() == {"prose", "code"}
    assert all(done.after[domain] < 0.9 * done.before[domain] for domain in done.before)


def test_the_values_that_are_kept_are_those_that_were_judged() -> None:
    case = make_case(torch.bfloat16)
    done = case.run()
    assert all(value.dtype == torch.bfloat16 for value in done.values)
    for each, value in zip(case.trained, done.values, strict=True):
        each.parameter.data.copy_(value)
    with torch.no_grad():
        found = {
            domain: float(divergence(case.student(ids), Bigrams(0)(ids))) / ids.numel()
            for domain, ids in case.pieces.judged.items()
        }
    assert found == pytest.approx(dict(done.after))


def test_a_harmful_training_is_dropped() -> None:
    case = make_case()
    before = [each.start.clone() for each in case.trained]
    done = case.run(rate=100.0)
    assert (done.kept, done.after) == (0, done.before)
    assert done.steps > 0
    assert all(torch.equal(value, start) for value, start in zip(done.values, before, strict=True))


def test_a_training_that_ends_in_infinities_is_dropped() -> None:
    assert make_case().run(rate=1e38).kept == 0


def test_a_domain_that_loses_drops_what_others_gain() -> None:
    case = make_case(domains=("prose", "code"))
    # The teacher of one domain's judges is another model, so that nearer to the other is farther from it.
    ids = case.pieces.judged["code"]

    def teacher(ids_BL: Tensor) -> Tensor:
        start = Bigrams(0.3)
        logits: Tensor = (start if ids_BL.shape == ids.shape and torch.equal(ids_BL, ids) else Bigrams(0))(ids_BL)
        return logits + 0.01 * torch.arange(V)

    done = Trainer(Pair(student=case.student, teacher=teacher), case.trained, case.pieces, rate=0.01, seed=0).run()
    assert done.kept == 0


def test_a_second_attempt_begins_where_the_first_one_did() -> None:
    case = make_case()
    case.run(rate=100.0)
    again, direct = case.run(), make_case().run()
    assert again.kept > 0
    assert all(torch.equal(one, two) for one, two in zip(again.values, direct.values, strict=True))


def test_the_same_seed_gives_the_same_values() -> None:
    first, again, other = make_case().run(seed=3), make_case().run(seed=3), make_case().run(seed=4)
    assert all(torch.equal(one, two) for one, two in zip(first.values, again.values, strict=True))
    assert not all(torch.equal(one, two) for one, two in zip(first.values, other.values, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stopped_after", [1, 55, 56, 57, 84, 111, 112])
def test_a_training_that_goes_on_from_any_step_ends_in_the_same_bits(dtype: torch.dtype, stopped_after: int) -> None:
    undisturbed, seen = make_case(dtype, domains=("prose", "code")).run(), list[Progress]()
    first = make_case(dtype, domains=("prose", "code")).trainer()

    def stop() -> None:
        if first.progress().steps == stopped_after:
            seen.append(deepcopy(first.progress()))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.run(stop)
    second, steps = make_case(dtype, domains=("prose", "code")).trainer(), list[int]()
    second.go_on_from(seen[0])
    done = second.run(lambda: steps.append(second.progress().steps))
    assert steps == list(range(stopped_after + 1, undisturbed.steps + 1))
    assert all(torch.equal(one, two) for one, two in zip(done.values, undisturbed.values, strict=True))
    assert (done.kept, done.before, done.after) == (undisturbed.kept, undisturbed.before, undisturbed.after)


def test_what_no_token_reaches_keeps_its_bits() -> None:
    case = make_case()
    done = case.run()
    assert done.kept > 0
    assert torch.equal(done.values[2], case.trained[2].start)
    assert not torch.equal(done.values[0], case.trained[0].start)


def test_a_step_is_a_share_of_the_size_of_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hcsmoe_hub.methods.distil.training.VISITED_TOKENS", 1)
    case = make_case()
    done = case.run(rate=1e-3)
    assert done.steps == 1
    for each, value in list(zip(case.trained, done.values, strict=True))[:2]:
        # The first step of Adam has the same size everywhere.
        size = 1e-3 * float(each.start.square().mean().sqrt())
        assert float((value - each.start).abs().max()) == pytest.approx(size, rel=1e-2)


def test_the_more_experts_were_lost_the_larger_is_the_rate() -> None:
    assert rates_for(0.9) == rates_for(0.75) == [LEAST_RATE]
    assert rates_for(0.5) == rates_for(0.1) == [pytest.approx(MOST_RATE), LEAST_RATE]
    assert LEAST_RATE < rates_for(0.6)[0] < MOST_RATE


def test_long_text_is_seen_in_part_and_short_text_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert step_count(10_000, 256) * step_pieces(10_000, 256) * 256 == VISITED_TOKENS
    assert step_count(448, 256) == 224
    assert step_count(40, 256) * step_pieces(40, 256) == 80
    assert (step_count(1, 8), step_pieces(1, 8)) == (2, 1)
