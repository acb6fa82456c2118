"""Evaluation of models with an encoder: targets are predicted from sources, in memory and layer by layer."""

import math
import shutil

import pytest
import torch
from calibration_text import refusal, text, write_rows
from sided_models import build_nllb, build_switch
from tiny_models import change_tensors
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from hcsmoe_hub.checkpoint.source import LocalSource
from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.evaluation.checkpoint import Checkpoint
from hcsmoe_hub.evaluation.evaluate import evaluate
from hcsmoe_hub.evaluation.options import EvaluateOptions
from hcsmoe_hub.evaluation.records import read_sides
from hcsmoe_hub.evaluation.scorer import Request
from hcsmoe_hub.evaluation.scorers import LoadedScorer, StreamedScorer
from hcsmoe_hub.evaluation.sides import cut_sides
from hcsmoe_hub.evaluation.tokens import Tokens

CPU = torch.device("cpu")
LENGTHS = ((5, 3), (9, 2), (9, 7), (1, 1), (12, 30), (3, 4))


@pytest.fixture(scope="module")
def switch(tmp_path_factory):
    return build_switch(tmp_path_factory.mktemp("sides") / "switch")


@pytest.fixture(scope="module")
def nllb(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sides") / "nllb"
    return build_nllb(folder, src_lang="eng_Latn", tgt_lang="deu_Latn")


@pytest.fixture(scope="module")
def other(switch):
    """The same Switch Transformer with other routers."""
    folder = shutil.copytree(switch, switch.parent / "other")

    def turn(tensors):
        for name in tensors:
            if "router" in name:
                tensors[name] = tensors[name].flip(0)

    change_tensors(folder, turn)
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Pairs of unequal lengths in two domains."""
    rows = [
        {
            "source": text(number, 3 + number % 5),
            "target": text(200 + number, 2 + number % 4),
            "domain": "ab"[number % 2],
        }
        for number in range(10)
    ]
    return write_rows(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows)


def requests(vocabulary=400):
    generator = torch.Generator().manual_seed(0)

    def some(length):
        return torch.randint(4, vocabulary, (length,), generator=generator).tolist()

    return [Request(some(target), 0, some(source)) for source, target in LENGTHS]


def scorers(folder):
    checkpoint = Checkpoint(LocalSource(folder))
    return LoadedScorer(checkpoint, CPU), StreamedScorer(checkpoint, CPU, pass_tokens=80)


def answers(scorer, asked):
    found = dict(scorer.logits(asked))
    return [found[index] for index in range(len(asked))]


def reference_logits(folder, asked):
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return [
            model(input_ids=torch.tensor([one.source]), labels=torch.tensor([one.ids])).logits[0, one.start :]
            for one in asked
        ]


def assert_close(found, wanted):
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


# Logits


def test_both_scorers_give_the_logits_of_a_switch_transformer(switch):
    wanted = reference_logits(switch, requests())
    for scorer in scorers(switch):
        assert_close(answers(scorer, requests()), wanted)


def test_a_switch_transformer_whose_experts_are_full_gives_the_same(tmp_path):
    folder = build_switch(tmp_path / "switch", expert_capacity=2)
    wanted = reference_logits(folder, requests())
    for scorer in scorers(folder):
        assert_close(answers(scorer, requests()), wanted)


def test_sources_of_an_nllb_model_do_not_depend_on_those_next_to_them(nllb):
    asked = requests(vocabulary=30)
    in_memory, layer_by_layer = scorers(nllb)
    alone = [answers(in_memory, [one])[0] for one in asked]
    assert_close(answers(in_memory, asked), alone)
    assert_close(answers(layer_by_layer, asked), alone)


def test_continuations_are_those_of_generate_however_the_model_runs(switch):
    sources = [list(one.source) for one in requests()]
    model = AutoModelForSeq2SeqLM.from_pretrained(switch, dtype=torch.float32)
    wanted = []
    for source in sources:
        ids = torch.tensor([source])
        with torch.no_grad():
            written = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, eos_token_id=None
            )
        wanted.append(written[0, 1:].tolist())
    for scorer in scorers(switch):
        assert scorer.continuations(sources, tokens=6, last=None, begins=[[]] * len(sources)) == wanted


def test_continuations_begin_behind_what_is_written(nllb):
    sources = [list(one.source) for one in requests(vocabulary=30)[:3]]
    begins = [[28], [27], [28]]
    in_memory, layer_by_layer = (one.continuations(sources, tokens=5, last=2, begins=begins) for one in scorers(nllb))
    assert in_memory == layer_by_layer
    assert all(len(ids) <= 5 for ids in in_memory)


# Files


def test_pairs_are_predicted_whole_from_their_sources(switch, pairs):
    tokenizer = AutoTokenizer.from_pretrained(switch)
    records, _ = read_sides(pairs)
    windows = cut_sides(records, Tokens(LocalSource(switch)), window=16)
    for record, window in zip(records, windows, strict=True):
        assert window.source == tokenizer(record.pair.source)["input_ids"]
        assert window.labels.tolist() == tokenizer(record.pair.target)["input_ids"]


def test_perplexity_of_targets_is_that_of_the_definition(switch, pairs, tmp_path):
    windows = cut_sides(read_sides(pairs)[0], Tokens(LocalSource(switch)), window=16)
    wanted = reference_logits(switch, [window.request for window in windows])
    losses: dict[str, list[float]] = {}
    for window, logits in zip(windows, wanted, strict=True):
        own = -logits.double().log_softmax(-1).gather(1, window.labels[:, None])[:, 0]
        for domain in (window.domain, "overall"):
            losses.setdefault(domain, []).extend(own.tolist())
    for stream in (False, True):
        measured = run(switch, tmp_path / "figures.json", perplexity=pairs, stream=stream)["perplexity"]
        figures = {**measured["model"]["domains"], "overall": measured["model"]["overall"]}
        assert figures.keys() == losses.keys()
        for domain, own in losses.items():
            assert figures[domain]["tokens"] == len(own)
            assert figures[domain]["perplexity"] == pytest.approx(math.exp(sum(own) / len(own)), rel=1e-5)
        assert measured["settings"]["predicts"] == "targets"
        assert measured["file"]["tokens"] == len(losses["overall"])


def run(folder, output, base=None, **options):
    settings = EvaluateOptions(base=base, device="cpu", window=16, output=output, **options)
    return evaluate(folder, settings)[0]["measures"]


def test_everything_is_measured_next_to_the_base(switch, other, pairs, tmp_path):
    questions = [{"context": "w1 w2", "choices": ["w3", "w4 w5"], "gold": number % 2} for number in range(4)]
    file = write_rows(tmp_path / "questions.jsonl", questions)
    found = run(other, tmp_path / "a.json", switch, perplexity=pairs, choices=file, generate=3)
    assert list(found) == ["perplexity", "agreement", "loops", "choices"]
    assert 0 < found["agreement"]["model"]["overall"]["top1_agreement"] < 1
    assert found["loops"]["model"]["overall"]["prompts"] == 3
    assert found["loops"]["settings"]["continuation_tokens"] == 128
    assert found["choices"]["model"]["overall"]["items"] == 4
    streamed = run(other, tmp_path / "b.json", switch, perplexity=pairs, choices=file, stream=True)
    for name in streamed:
        ours, theirs = found[name]["model"]["overall"], streamed[name]["model"]["overall"]
        assert theirs == pytest.approx(ours, rel=1e-4, abs=1e-5)


def test_a_model_agrees_with_itself(nllb, tmp_path):
    rows = [{"source": "ab c", "target": "de"}, {"source": "abcdefg", "target": "defgh", "target_lang": "fra_Latn"}]
    found = run(nllb, tmp_path / "a.json", nllb, perplexity=write_rows(tmp_path / "p.jsonl", rows), generate=2)
    assert found["agreement"]["model"]["overall"]["top1_agreement"] == 1
    assert found["agreement"]["model"]["overall"]["kl"] == pytest.approx(0, abs=1e-6)
    assert found["loops"]["model"]["overall"]["prompts"] == 2


def test_text_is_predicted_where_spans_were_cut_out(switch, tmp_path):
    file = write_rows(tmp_path / "text.jsonl", [{"text": text(0, 70), "domain": "a"}, {"text": "w1"}])
    windows = cut_sides(read_sides(file)[0], Tokens(LocalSource(switch)), window=30)
    assert [len(window.source) + len(window.ids) for window in windows[:-1]] == [30] * (len(windows) - 1)
    again = cut_sides(read_sides(file)[0], Tokens(LocalSource(switch)), window=30)
    assert windows == again
    found = run(switch, tmp_path / "a.json", perplexity=file)
    assert found["perplexity"]["model"]["domains"].keys() == {"a"}


def test_sources_to_continue_are_evenly_spaced_and_bounded(switch, pairs, tmp_path):
    error = refusal(lambda: run(switch, tmp_path / "a.json", perplexity=pairs, generate=11), PlanError)
    assert "11 sources were requested, but there are only 10" in error.message


# What is refused


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"source": "w1", "target": ""}, "the target of line 2 of {} is empty."),
        ({"source": "w1", "target": None}, "line 2 of {} has no target."),
        ({"source": 3, "target": "w1"}, "the source of line 2 of {} is 3, which is not text."),
        ({"source": "w1"}, "line 2 of {} has neither source and target nor text: its columns are source."),
        ({"source": "w1", "target": "\ud83d"}, "line 2 of {} holds half of a surrogate pair"),
        ({"source": "w1", "target": "w2", "domain": 3}, "line 2 of {} has the domain 3"),
        ({"source": "w1", "target": "w2", "target_lang": 3}, "target_lang of line 2 of {} is 3, which is not text."),
    ],
)
def test_a_pair_that_cannot_be_used_is_refused_with_its_line(tmp_path, row, reason):
    file = write_rows(tmp_path / "pairs.jsonl", [{"source": "w1", "target": "w2"}, row])
    assert refusal(lambda: read_sides(file), PlanError).message.startswith(reason.format(file))


def test_text_is_refused_where_the_tokenizer_has_no_sentinels(nllb, tmp_path):
    file = write_rows(tmp_path / "text.jsonl", [{"text": "ab cd"}])
    error = refusal(lambda: run(nllb, tmp_path / "a.json", perplexity=file), PlanError)
    assert "has no sentinels" in error.message


def test_a_language_that_nobody_names_is_refused(tmp_path):
    folder = build_nllb(tmp_path / "nllb")
    file = write_rows(tmp_path / "pairs.jsonl", [{"source": "ab", "target": "cd"}])
    error = refusal(lambda: run(folder, tmp_path / "a.json", perplexity=file), PlanError)
    assert "line 1 of" in error.message
    assert "add a column target_lang" in error.message


def test_tasks_of_lm_eval_are_refused_before_they_are_looked_for(switch, tmp_path):
    error = refusal(lambda: run(switch, tmp_path / "a.json", tasks=("no-such-task",)), PlanError)
    assert "the tasks of lm-eval continue a text" in error.message


def test_sources_longer_than_the_positions_are_refused(nllb, tmp_path):
    file = write_rows(tmp_path / "pairs.jsonl", [{"source": "a" * 300, "target": "b"}])
    error = refusal(lambda: run(nllb, tmp_path / "a.json", perplexity=file), PlanError)
    assert "accepts 256 positions" in error.message


def test_a_base_without_an_encoder_is_refused(switch, base, pairs, tmp_path):
    error = refusal(lambda: run(switch, tmp_path / "a.json", base, perplexity=pairs), PlanError)
    assert "has an encoder, so they cannot be compared" in error.message
