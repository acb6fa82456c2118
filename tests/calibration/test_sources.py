"""What ``--calibration`` can name: one source or several with shares, and what is refused before anything is read."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from calibration_text import (
    VOCABULARY,
    ids,
    load_token_ids,
    plan,
    refusal,
    save,
    text,
    write_rows,
    write_texts,
    write_tokenizer,
)
from tiny_models import build
from torch import Tensor

from hcsmoe_hub import CalibrationOptions, ConvertOptions, convert
from hcsmoe_hub.calibration.plan import CalibrationPlan
from hcsmoe_hub.calibration.sources import dataset_name, parse_sources
from hcsmoe_hub.calibration.token_ids import fingerprint
from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.events import Event, Warned
from hcsmoe_hub.model_cards import write_card
from hcsmoe_hub.report.read import read_report

pytestmark = pytest.mark.usefixtures("no_network", "short_wait")


@pytest.fixture
def prose(tmp_path: Path) -> Path:
    """Text of words below 100."""
    return write_texts(tmp_path / "prose.jsonl", [text(number, 7) for number in range(90)])


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """Text of words from 200 on."""
    return write_texts(tmp_path / "code.jsonl", [text(200 + number, 7) for number in range(90)])


def load(chosen: CalibrationPlan, tokenizer: Path) -> tuple[Tensor, list[str]]:
    """The token ids of a plan, and the warnings about them."""
    events: list[Event] = []
    found = load_token_ids(chosen, tokenizer_folder=tokenizer, vocab_size=VOCABULARY, emit=events.append)
    return found, [event.message for event in events if isinstance(event, Warned)]


# Several sources


@pytest.mark.parametrize(
    ("shares", "counts"),
    [(("", ""), (4, 4)), (("=0.75", "=0.25"), (6, 2)), (("=3", "=1"), (6, 2)), (("=1e-1", "=0.1"), (4, 4))],
    ids=["none", "of one", "relative", "equal"],
)
def test_shares_decide_how_many_sequences_each_source_gives(
    tokenizer: Path, prose: Path, code: Path, shares: tuple[str, str], counts: tuple[int, int]
) -> None:
    chosen = plan(f"{prose}{shares[0]},{code}{shares[1]}", samples=8)
    found, warnings = load(chosen, tokenizer)
    is_code = (found > ids(150, 1)[0]).any(dim=1)
    assert (int((~is_code).sum()), int(is_code.sum())) == counts
    assert chosen.counts(8) == list(counts)
    assert warnings == []


def test_every_beginning_of_a_mixture_has_its_shares(prose: Path, code: Path) -> None:
    chosen = plan(f"{prose}=0.5,{code}=0.3,bundled=0.2", samples=100)
    order = chosen.order(100)
    assert Counter(order) == {0: 50, 1: 30, 2: 20}
    assert order[:10] == chosen.order(10)
    assert Counter(order[:10]) == {0: 5, 1: 3, 2: 2}


def test_a_mixture_holds_the_sequences_of_each_source_alone(tokenizer: Path, prose: Path, code: Path) -> None:
    chosen = plan(f"{prose},{code}", samples=6)
    found, _ = load(chosen, tokenizer)
    alone = [load(plan(file, samples=3), tokenizer)[0].tolist() for file in (prose, code)]
    for index, expected in enumerate(alone):
        assert [row for row, source in zip(found.tolist(), chosen.order(6), strict=True) if source == index] == expected


def test_the_same_mixture_gives_the_same_tokens(tokenizer: Path, prose: Path, code: Path) -> None:
    chosen = plan(f"{prose}=0.7,{code}=0.3", samples=10)
    assert fingerprint(load(chosen, tokenizer)[0]) == fingerprint(load(chosen, tokenizer)[0])


def test_a_source_that_is_too_short_cuts_the_others_so_that_shares_hold(
    tokenizer: Path, prose: Path, tmp_path: Path
) -> None:
    short = write_texts(tmp_path / "short.jsonl", [text(200, 11)])
    found, warnings = load(plan(f"{prose}=0.5,{short}=0.5", samples=40), tokenizer)
    # Four of the first and three of the second: the next one would be of the second again.
    assert len(found) == 7
    assert warnings == ["short.jsonl fills only 3 sequences, so the other sources are cut to keep their shares."]


def test_a_named_column_is_not_looked_for_in_the_bundled_text(tokenizer: Path, tmp_path: Path) -> None:
    own = write_rows(tmp_path / "own.jsonl", [{"text": text(200, 9), "body": text(0, 9)}])
    found, _ = load(plan(f"{own},bundled", samples=4, text_column="body"), tokenizer)
    assert found[[0, 2]].tolist() == [ids(0, 4), ids(4, 4)]


def test_a_share_that_is_less_than_a_sequence_is_refused(prose: Path, code: Path) -> None:
    error = refusal(lambda: plan(f"{prose}=0.99,{code}=0.01", samples=8))
    assert f"the share of {code} is less than one of 8 sequences" in error.message
    assert "`samples`" in error.hint


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        ("prose.jsonl=0,c4=1", "'prose.jsonl=0' is not a number above 0"),
        ("prose.jsonl=-1,c4=1", "not a number above 0"),
        ("prose.jsonl=nan,c4=1", "not a number above 0"),
        ("prose.jsonl=half,c4=1", "not a number above 0"),
        ("prose.jsonl=50%,c4=50%", "not a number above 0"),
        ("prose.jsonl,c4=1", "not prose.jsonl"),
        ("prose.jsonl=1,c4", "not c4"),
        ("c4,c4", "names c4 twice"),
        ("prose.jsonl,,c4", "lacks the name of a text"),
        ("prose.jsonl,", "lacks the name of a text"),
        ("", "lacks the name of a text"),
    ],
)
def test_shares_that_cannot_be_read_are_refused(shares: str, words: str) -> None:
    assert words in refusal(lambda: plan(shares)).message


def test_token_ids_cannot_be_mixed_with_other_sources(tmp_path: Path) -> None:
    file = save(tmp_path / "ids.npy", np.zeros((2, 4), dtype=np.int64))
    assert "cannot be mixed" in refusal(lambda: plan(f"{file},bundled")).message


def test_every_source_of_a_mixture_is_checked_before_any_is_read(prose: Path) -> None:
    assert "missing.jsonl" in refusal(lambda: plan(f"{prose},missing.jsonl")).message


def test_files_of_the_same_name_have_domains_of_their_own() -> None:
    domains = [source.domain for source in parse_sources("a/text.jsonl,b/text.jsonl,c4")]
    assert domains == ["text.jsonl", "text.jsonl (2)", "c4"]


@pytest.mark.parametrize("name", ["a,b.jsonl", "a=0.5.jsonl", "a=1", "a:b.jsonl"])
def test_a_file_that_exists_is_one_source_whatever_its_name(tmp_path: Path, name: str) -> None:
    file = write_texts(tmp_path / name, [text(0, 9)])
    (source,) = parse_sources(str(file))
    assert (source.path, source.share, source.name) == (file, 1.0, name)


# Names


def test_published_names_have_no_folders(tmp_path: Path) -> None:
    (tmp_path / "private" / "chats").mkdir(parents=True)
    folder = tmp_path / "private" / "chats"
    assert dataset_name(f"{folder}=2,{folder}/a.jsonl=1,org/name:config:split=1") == (
        "chats=2,a.jsonl=1,org/name:config:split=1"
    )
    assert dataset_name(f"{folder}/") == "chats"


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        ("c4:en", "c4 has neither configs nor splits"),
        ("bundled:train", "bundled has neither configs nor splits"),
        ("org/name:a:b:c", "is not ID[:CONFIG][:SPLIT]"),
        ("org/name:", "is not ID[:CONFIG][:SPLIT]"),
        ("https://huggingface.co/datasets/org/name", "is an address"),
        ("hf://datasets/org/name", "is an address"),
        ("a\0b", "there is no calibration file"),
        ("x" * 5000, "there is no calibration file"),
        ("~nobody-of-this-name/a.jsonl", "there is no calibration file"),
    ],
)
def test_a_name_that_cannot_be_a_dataset_is_refused(dataset: str, words: str) -> None:
    assert words in refusal(lambda: plan(dataset)).message


@pytest.mark.parametrize("dataset", ["org/name:config:split", "org/name:split", "wikitext:wikitext-2-raw-v1:train"])
def test_configs_and_splits_are_looked_up_later(dataset: str) -> None:
    assert plan(dataset).dataset == dataset


# What a report says


def test_a_report_names_the_sources_with_their_shares_and_domains(prose: Path, code: Path, tmp_path: Path) -> None:
    model, result = tmp_path / "model", tmp_path / "result"
    build(model, vocab_size=VOCABULARY, bos_token_id=None, eos_token_id=0)
    write_tokenizer(model, eos_token="</s>")
    asked = ConvertOptions(
        experts=4,
        output=result,
        calibration=CalibrationOptions(dataset=f"{prose}=3,{code}=1", samples=8, sequence_length=16),
        statistics=tmp_path / "statistics",
    )
    report = convert(model, asked)
    assert read_report((result / "hcsmoe.json").read_text(), label="hcsmoe.json").calibration == report.calibration
    assert (report.calibration["dataset"], report.calibration["dataset_sha256"]) == ("prose.jsonl=3,code.jsonl=1", None)
    first, second = report.calibration["sources"]
    assert (first["dataset"], first["share"], first["sequences"], first["tokens"]) == ("prose.jsonl", 0.75, 6, 96)
    assert (second["domain"], second["share"], second["sequences"]) == ("code.jsonl", 0.25, 2)
    assert first["sha256"] != second["sha256"]
    card = write_card(result, overwrite=True).path.read_text("utf-8")
    assert "75.0 % `prose.jsonl` and 25.0 % `code.jsonl`" in card
    assert "--calibration prose.jsonl=3,code.jsonl=1" in card

    # Statistics know the mixture by its files, and a changed one is another mixture.
    shutil.rmtree(result)
    assert convert(model, asked).calibration == report.calibration
    shutil.rmtree(result)
    code.write_text(json.dumps({"text": text(0, 99)}))
    assert "was collected with dataset" in refusal(lambda: convert(model, asked), PlanError).message
