"""All experts at once compute and observe what one expert after the other does."""

from collections.abc import Iterator

import pytest
import torch
from observed_blocks import probe, relative, tiny_case

import hcsmoe_hub.observation.visits
from hcsmoe_hub.machine.accelerator import HOST
from hcsmoe_hub.model.expert_kinds import experts_of
from hcsmoe_hub.observation.calibration_observer import mean_outputs
from hcsmoe_hub.observation.visits import grouped_matrices, sorted_choices

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


# Those whose experts are the first dimension of every tensor; zaya's router may choose none.
GROUPED = ("mixtral", "gpt_oss", "nemotron_h", "llama4", "zaya")
SUMS = ("usage_E", "saliency_E", "mass_E", "norm_E", "gram_EE", "probability_E", "logits_gram_EE")


def pretend_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets products of the host be grouped, as those of an accelerator are."""
    monkeypatch.setattr(hcsmoe_hub.observation.visits, "is_host", lambda device: False)


@pytest.mark.parametrize("elements", [1 << 26, 200])
@pytest.mark.parametrize("name", GROUPED)
def test_grouped_products_give_the_same_outputs_and_statistics(
    name: str, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = tiny_case(name)
    one_by_one, expected = probe(case, with_gram=True)
    pretend_accelerator(monkeypatch)
    # Of so few elements, every chunk holds a few tokens only.
    monkeypatch.setattr(hcsmoe_hub.observation.visits, "CHUNK_ELEMENTS", elements)
    experts = experts_of(case.experts)
    assert grouped_matrices(experts, torch.zeros(1, 8)) is not None
    grouped, found = probe(case, with_gram=True)
    assert relative(torch.cat(found), torch.cat(expected)) < 1e-5
    for one, other in zip(grouped.top_k, one_by_one.top_k, strict=True):
        assert torch.equal(one, other)
    for name in SUMS:
        torch.testing.assert_close(
            getattr(grouped.statistics, name), getattr(one_by_one.statistics, name), rtol=3e-5, atol=1e-6
        )
    means = [mean_outputs(experts, observer.statistics) for observer in (grouped, one_by_one)]
    torch.testing.assert_close(*means, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["dbrx", "muse_spark"])
def test_experts_whose_tensors_do_not_begin_with_the_experts_run_one_after_the_other(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_accelerator(monkeypatch)
    assert grouped_matrices(experts_of(tiny_case(name).experts), torch.zeros(1, 8)) is None


def test_experts_in_another_dtype_than_the_tokens_run_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_accelerator(monkeypatch)
    experts = experts_of(tiny_case("mixtral").experts)
    assert grouped_matrices(experts, torch.zeros(1, 8, dtype=torch.bfloat16)) is None


def test_the_host_runs_one_expert_after_the_other() -> None:
    experts = experts_of(tiny_case("mixtral").experts)
    assert grouped_matrices(experts, torch.zeros(1, 8, device=HOST)) is None


def test_choices_are_sorted_by_expert_in_the_order_of_the_tokens() -> None:
    chosen = torch.tensor([[2, 0], [-1, 2], [0, 2], [-1, -1]])
    found = [(token.tolist(), slot.tolist()) for token, slot in sorted_choices(chosen, 3)]
    assert found == [([0, 2], [1, 0]), ([], []), ([0, 1, 2], [0, 1, 1])]
