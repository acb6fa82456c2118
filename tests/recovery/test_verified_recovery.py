"""``verify`` of recovered results: what training may have changed, and what it may not."""

import pytest
from recovered import run
from tiny_models import change_tensors

from hcsmoe_hub.checkpoint.source import LocalSource
from hcsmoe_hub.errors import VerificationError
from hcsmoe_hub.result.verify import verify

pytestmark = pytest.mark.usefixtures("one_thread")

# Of each of two layers, and the embedding, the norm after the layers and the head.
ATTENTION, NORMS, OUTSIDE = 2 * 4, 2 * 2, 3


@pytest.mark.parametrize(
    ("train", "identical"),
    [("router+experts+norms", ATTENTION + OUTSIDE - 1), ("router", ATTENTION + NORMS + OUTSIDE), ("lora", OUTSIDE)],
)
def test_what_was_not_trained_is_compared_with_the_source(source, train, identical):
    report = run(source, train=tuple(train.split("+")), learning_rate=None, max_steps=8)
    assert report.is_better
    assert verify(report.output, against=LocalSource(source)).identical == identical


def test_a_frozen_tensor_that_differs_is_found(source):
    report = run(source, max_steps=8)

    def turn(tensors):
        for name in tensors:
            if "q_proj" in name:
                tensors[name] = tensors[name].flip(0)

    change_tensors(report.output, turn)
    with pytest.raises(VerificationError, match=r"q_proj\.weight' differs"):
        verify(report.output, against=LocalSource(source))


def test_a_recovery_that_brought_nothing_leaves_every_norm_as_it_was(source):
    report = run(source, learning_rate=5.0, max_steps=2, evaluate_every=2)
    assert not report.is_better
    found = verify(report.output, against=LocalSource(source))
    assert found.identical == ATTENTION + NORMS + OUTSIDE
