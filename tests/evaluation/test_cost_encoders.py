"""The cost of models whose encoder reads one text and whose decoder writes another, next to counts by hand."""

from pathlib import Path

import pytest
import torch
from transformers import (
    NllbMoeConfig,
    NllbMoeForConditionalGeneration,
    PreTrainedModel,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

from hcsmoe_hub.checkpoint.source import LocalSource
from hcsmoe_hub.evaluation.checkpoint import Checkpoint
from hcsmoe_hub.evaluation.cost_flops import count_flops
from hcsmoe_hub.evaluation.cost_options import CostOptions
from hcsmoe_hub.evaluation.cost_parameters import active_parameters
from hcsmoe_hub.evaluation.evaluate import evaluate
from hcsmoe_hub.evaluation.options import EvaluateOptions
from hcsmoe_hub.model.source_model import read_model
from hcsmoe_hub.planning.sizes import active_parameters as reported_active

HIDDEN, NEURONS, VOCABULARY, EXPERTS, CONTEXT = 32, 48, 64, 6, 40
ACTIVE = {"switch": 1, "nllb": 2}


def tiny(name: str) -> PreTrainedModel:
    """Two layers in each stack, of which the second one has experts."""
    if name == "switch":
        return SwitchTransformersForConditionalGeneration(
            SwitchTransformersConfig(
                vocab_size=VOCABULARY, d_model=HIDDEN, d_kv=8, d_ff=NEURONS, num_layers=2, num_decoder_layers=2,
                num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_heads=4, num_experts=EXPERTS,
                decoder_start_token_id=0,
            )
        )  # fmt: skip
    return NllbMoeForConditionalGeneration(
        NllbMoeConfig(
            vocab_size=VOCABULARY, d_model=HIDDEN, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=NEURONS,
            decoder_ffn_dim=NEURONS, encoder_attention_heads=4, decoder_attention_heads=4, num_experts=EXPERTS,
            encoder_sparse_step=2, decoder_sparse_step=2, max_position_embeddings=128, decoder_start_token_id=2,
        )
    )  # fmt: skip


@pytest.fixture(params=ACTIVE)
def stacks(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """An architecture, and the folder of a tiny model of it."""
    torch.manual_seed(0)
    tiny(request.param).save_pretrained(tmp_path / "model")
    return request.param, tmp_path / "model"


def test_tokens_of_both_stacks_equal_a_count_by_hand(stacks: tuple[str, Path]) -> None:
    name, folder = stacks
    dense = 2 * 2 * HIDDEN * NEURONS
    feed_forward = dense + 2 * HIDDEN * EXPERTS + ACTIVE[name] * dense
    projection, per_key = 2 * HIDDEN * HIDDEN, 2 * 2 * HIDDEN

    def written(keys: int) -> int:
        """Of one token: attention to what was written, to the source, both blocks, and the head."""
        attention = 4 * projection + per_key * keys + 2 * projection + per_key * CONTEXT
        return 2 * attention + feed_forward + 2 * HIDDEN * VOCABULARY

    encoded = 2 * (4 * projection + per_key * CONTEXT) + feed_forward
    # Keys and values of the source are computed once, for both layers of the decoder.
    prefill = encoded + 2 * 2 * projection + written(1) / CONTEXT
    model = Checkpoint(LocalSource(folder))
    found = count_flops(model.skeleton(), CONTEXT)
    assert found.prefill == pytest.approx(prefill, rel=0.01)
    assert found.decode == pytest.approx(written(CONTEXT + 1), rel=0.01)
    assert active_parameters(model.skeleton(), found.active_experts) == reported_active(read_model(LocalSource(folder)))


def test_both_stacks_run_and_are_timed(stacks: tuple[str, Path]) -> None:
    _, folder = stacks
    cost = CostOptions(prompt_tokens=8, new_tokens=2, repetitions=1, batch_sizes=(2,))
    document, _ = evaluate(folder, EvaluateOptions(device="cpu", cost=cost))
    found = document["measures"]["cost"]["model"]
    assert found["throughput"]["2"]["prefill"]["tokens_per_second"]["median"] > 0
    assert found["throughput"]["2"]["decode"]["tokens_per_second"]["median"] > 0
    assert found["peak_memory"]["batches"]["2"] > 0
