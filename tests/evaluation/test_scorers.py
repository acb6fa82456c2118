"""Logits of both scorers against those of transformers itself."""

import pytest
import torch
from architectures import save_tiny
from mapped_models import example_maps, write_result
from test_quantized_sources import fp8_source  # noqa: F401
from tiny_models import VOCABULARY, build
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from hcsmoe_hub.checkpoint.source import LocalSource
from hcsmoe_hub.evaluation.checkpoint import Checkpoint
from hcsmoe_hub.evaluation.scorer import Request, Scorer
from hcsmoe_hub.evaluation.scorers import LoadedScorer, StreamedScorer, make_scorers
from hcsmoe_hub.model.source_model import read_model

CPU = torch.device("cpu")


def requests(seed: int = 0, vocabulary: int = VOCABULARY) -> list[Request]:
    """Sequences of several lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (9, 1, 30, 17, 17, 4)
    rows = [torch.randint(0, vocabulary, (length,), generator=generator).tolist() for length in lengths]
    return [Request(ids, len(ids) // 3) for ids in rows]


def answers(scorer: Scorer, asked: list[Request]) -> list[torch.Tensor]:
    """Logits in the order of the requests."""
    found = dict(scorer.logits(asked))
    return [found[index] for index in range(len(asked))]


def expected(model: torch.nn.Module, asked: list[Request]) -> list[torch.Tensor]:
    """The model's logits of each sequence alone."""
    with torch.no_grad():
        return [model(input_ids=torch.tensor([request.ids])).logits[0, request.start :] for request in asked]


def assert_close(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# Models that cap or scale their logits, declare no base model, mix kinds of layers, or count experts elsewhere.
@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("mixtral", {}),
        ("deepseek_v3", {}),
        ("dbrx", {}),
        ("gemma4_text", {"final_logit_softcapping": 2.0}),
        ("granitemoe", {"logits_scaling": 3.0}),
        ("granitemoehybrid", {}),
        ("llama4_text", {}),
        ("qwen3_next", {}),
    ],
)
def test_both_scorers_give_the_logits_of_the_model(tmp_path, model_type, changes):
    wanted = expected(save_tiny(model_type, tmp_path / "model", **changes), requests())
    checkpoint = Checkpoint(LocalSource(tmp_path / "model"))
    assert_close(answers(LoadedScorer(checkpoint, CPU), requests()), wanted)
    assert_close(answers(StreamedScorer(checkpoint, CPU, pass_tokens=40), requests()), wanted)


def test_decoded_weights_are_computed_in_float32(request):
    folder = request.getfixturevalue("fp8_source")
    checkpoint, asked = Checkpoint(LocalSource(folder)), requests()
    quantization = FineGrainedFP8Config(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=quantization)
    wanted = expected(torch.nn.Module.float(model), asked)
    assert_close(answers(LoadedScorer(checkpoint, CPU), asked), wanted)
    assert_close(answers(StreamedScorer(checkpoint, CPU), asked), wanted)


def test_stored_bfloat16_is_computed_in_float32(tmp_path):
    folder = build(tmp_path / "model", dtype=torch.bfloat16, tie_word_embeddings=True)
    asked = requests()
    wanted = expected(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), asked)
    for scorer in make_scorers([Checkpoint(LocalSource(folder))] * 2, CPU, stream=False):
        assert_close(answers(scorer, asked), wanted)
    assert_close(answers(*make_scorers([Checkpoint(LocalSource(folder))], CPU, stream=True), asked), wanted)


def test_mapped_result_is_scored_as_its_full_twin_without_running_its_file(tmp_path):
    source = build(tmp_path / "source")
    maps = example_maps(read_model(LocalSource(source)))
    twins = [write_result(source, tmp_path / str(mapped), maps, mapped=mapped) for mapped in (True, False)]
    (twins[0] / "modeling_hcsmoe.py").write_text("raise RuntimeError\n")
    scorers = [kind(Checkpoint(LocalSource(twin)), CPU) for twin in twins for kind in (LoadedScorer, StreamedScorer)]
    found = [answers(scorer, requests()) for scorer in scorers]
    for others in found[1:]:
        assert_close(others, found[0])


def test_logits_come_shortest_first_whatever_the_batch(loaded, streamed):
    lengths = [[len(asked.ids) for asked in requests()][index] for index, _ in loaded.logits(requests())]
    assert lengths == sorted(lengths)
    assert [index for index, _ in streamed.logits(requests())] == [index for index, _ in loaded.logits(requests())]


@pytest.mark.parametrize("batch_tokens", [1, 20, 10_000])
def test_batch_size_changes_nothing_but_noise(model, loaded, batch_tokens):
    scorer = StreamedScorer(Checkpoint(LocalSource(model)), CPU, pass_tokens=batch_tokens)
    assert_close(answers(scorer, requests()[:4]), answers(loaded, requests()[:4]))


def test_continuations_are_the_same_however_the_model_runs(loaded, streamed):
    prompts = [[5, 9, 13], [20, 21, 22], [7, 7, 7]]
    found = loaded.continuations(prompts, tokens=6, last=None)
    assert [len(ids) for ids in found] == [6, 6, 6]
    assert streamed.continuations(prompts, tokens=6, last=None) == found


def test_continuations_stop_before_the_last_token(loaded, streamed):
    prompts = [[5, 9, 13], [20, 21, 22]]
    free = loaded.continuations(prompts, tokens=6, last=None)
    last = free[0][2]
    wanted = [ids[: ids.index(last)] if last in ids else ids for ids in free]
    assert len(wanted[0]) <= 2
    assert loaded.continuations(prompts, tokens=6, last=last) == wanted
    assert streamed.continuations(prompts, tokens=6, last=last) == wanted


def test_model_that_does_not_fit_is_streamed(model, monkeypatch):
    checkpoint = Checkpoint(LocalSource(model))
    assert checkpoint.nbytes == 4 * read_model(LocalSource(model)).parameters
    for free, kind in ((2 * checkpoint.nbytes, LoadedScorer), (checkpoint.nbytes, StreamedScorer)):
        monkeypatch.setattr("hcsmoe_hub.evaluation.scorers.free_bytes", lambda device, free=free: free)
        assert type(make_scorers([checkpoint], CPU, stream=False)[0]) is kind
