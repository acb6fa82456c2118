"""Domains of calibration text: sequences of one domain each, in shares, and others to measure on."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from calibration_text import EOS, FIRST, VOCABULARY, ids, plan, text, write_rows, write_texts
from places import EXAMPLE

from hcsmoe_hub.calibration.calibration_set import CalibrationSet
from hcsmoe_hub.calibration.plan import CalibrationPlan, plan_calibration
from hcsmoe_hub.calibration.text import load_calibration
from hcsmoe_hub.options import CalibrationOptions

pytestmark = pytest.mark.usefixtures("no_network", "short_wait")

# Every domain has words of its own.
STARTS = {"prose": 0, "code": 100, "french": 200, "legal": 300}


@pytest.fixture
def load(tokenizer: Path) -> Any:
    """Loads a calibration set with the plain tokenizer."""

    def run(chosen: CalibrationPlan) -> CalibrationSet:
        return load_calibration(chosen, tokenizer_folder=tokenizer, vocab_size=VOCABULARY)

    return run


def rows(counts: dict[str, int], length: int = 7) -> list[dict[str, str]]:
    """Documents of every domain, each with other words: they begin one word apart."""
    return [
        {"text": text(STARTS[domain] + number, length), "domain": domain}
        for domain, count in counts.items()
        for number in range(count)
    ]


def fitted(file: Path, **options: Any) -> CalibrationPlan:
    """A plan for a fit, without a number of samples."""
    chosen = CalibrationOptions(dataset=str(file), **({"sequence_length": 4} | options))
    return plan_calibration(chosen, max_positions=64, has_tokenizer=True, label="org/model", fits=True)


def domain_of(sequence: Sequence[int]) -> str:
    """The domain that all words of a sequence belong to."""
    found = {
        next(name for name in reversed(STARTS) if token - FIRST >= STARTS[name]) for token in sequence if token != EOS
    }
    assert len(found) == 1, "a sequence is of one domain"
    return found.pop()


def documents(token_ids: torch.Tensor) -> set[int]:
    """Documents that sequences have tokens of, by the distance from one word to the next: see ``distinct``."""
    return {token for token in token_ids.flatten().tolist() if token != EOS}


def distinct(counts: dict[str, int], length: int) -> list[dict[str, str]]:
    """Documents that repeat one word each, so that every token says which document it is of."""
    return [
        {"text": " ".join([f"w{STARTS[domain] + number}"] * length), "domain": domain}
        for domain, count in counts.items()
        for number in range(count)
    ]


# Domains


def test_every_sequence_is_of_the_domain_that_its_records_name(load: Any, tmp_path: Path) -> None:
    found = load(plan(write_rows(tmp_path / "a.jsonl", rows({"prose": 40, "code": 40})), samples=30))
    assert [domain_of(sequence) for sequence in found.token_ids.tolist()] == list(found.domains)
    assert [domain_of(sequence) for sequence in found.measured_ids.tolist()] == list(found.measured_domains)
    assert set(found.domains) == set(found.measured_domains) == {"prose", "code"}


def test_domains_of_a_file_have_the_shares_that_the_file_has(load: Any, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", rows({"prose": 75, "code": 25}))
    counts = Counter(load(plan(file, samples=200)).domains)
    assert counts == {"prose": 150, "code": 50}
    half = Counter(load(plan(file, samples=100)).domains)
    assert 65 <= half["prose"] <= 85


def test_every_beginning_of_a_set_has_the_shares_of_its_domains(load: Any, tmp_path: Path) -> None:
    found = load(plan(write_rows(tmp_path / "a.jsonl", rows({"prose": 60, "code": 20, "french": 20})), samples=200))
    for size in (10, 50, 100):
        counts = Counter(found.domains[:size])
        assert abs(counts["prose"] - 0.6 * size) <= 1
        assert abs(counts["code"] - 0.2 * size) <= 1


def test_records_without_a_domain_have_one_in_common(load: Any, tmp_path: Path) -> None:
    given = [*rows({"prose": 9}), *({"text": text(100, 7), "domain": blank} for blank in (None, "", None))]
    assert Counter(load(plan(write_rows(tmp_path / "a.jsonl", given), samples=99)).domains) == {"prose": 18, "other": 6}


def test_domains_that_fill_no_sequence_are_joined(load: Any, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", rows({"prose": 9, "code": 1, "french": 1}))
    found = load(plan(file, samples=9, sequence_length=16))
    assert Counter(found.domains) == {"prose": 4, "other": 1}
    assert {token for token in found.token_ids[found.domains.index("other")].tolist()} == {
        *ids(100, 7),
        *ids(200, 7),
        EOS,
    }


def test_a_file_whose_domains_are_all_short_is_one_domain(load: Any, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", rows({"prose": 1, "code": 1}))
    assert load(plan(file, samples=9, sequence_length=16)).domains == ("a.jsonl",)


@pytest.mark.parametrize(
    "domain",
    [lambda number: f"www.{number}.example", lambda number: number, lambda number: "x" * 99, lambda number: ["x"]],
    ids=["many", "numbers", "long", "lists"],
)
def test_a_column_that_does_not_name_a_few_domains_changes_nothing(load: Any, tmp_path: Path, domain: Any) -> None:
    texts = [text(number, 7) for number in range(50)]
    plain = load(plan(write_texts(tmp_path / "a.jsonl", texts), samples=40))
    given = [{"text": one, "domain": domain(number)} for number, one in enumerate(texts)]
    found = load(plan(write_rows(tmp_path / "b.jsonl", given), samples=40))
    assert set(found.domains) == {"b.jsonl"}
    assert torch.equal(found.token_ids, plain.token_ids)


def test_domains_of_the_same_name_carry_the_name_of_their_source(load: Any, tmp_path: Path) -> None:
    first = write_rows(tmp_path / "a.jsonl", rows({"prose": 20, "code": 20}))
    second = write_rows(tmp_path / "b.jsonl", rows({"prose": 20, "legal": 20}))
    found = load(plan(f"{first},{second}", samples=40))
    assert set(found.domains) == {"a.jsonl: prose", "code", "b.jsonl: prose", "legal"}
    assert Counter(found.sources) == {0: 20, 1: 20}


def test_a_source_without_domains_is_one_domain_next_to_those_of_another(load: Any, tmp_path: Path) -> None:
    first = write_texts(tmp_path / "own.jsonl", [text(number, 7) for number in range(40)])
    found = load(plan(f"{first},{write_rows(tmp_path / 'b.jsonl', rows({'code': 20, 'legal': 20}))}", samples=40))
    assert set(found.domains) == {"own.jsonl", "code", "legal"}
    assert found.domains[0] == "own.jsonl"
    assert found.sources[:4] == (0, 1, 0, 1)


def test_the_bundled_text_has_more_of_some_domains_than_of_others(load: Any) -> None:
    counts = Counter(load(plan("bundled", samples=66, sequence_length=64)).domains)
    assert {domain: count for domain, count in counts.items() if count != 3} == {
        **dict.fromkeys(("code", "manual", "prose"), 9),
        **dict.fromkeys(("dialogue", "mathematics", "french", "german", "spanish"), 6),
    }
    assert len(counts) == 11


def test_the_bundled_text_fills_the_set_of_a_fit_and_measures_every_domain() -> None:
    vocabulary = json.loads((EXAMPLE / "config.json").read_text())["vocab_size"]
    chosen = plan_calibration(CalibrationOptions(), max_positions=None, has_tokenizer=True, label="example", fits=True)
    found = load_calibration(chosen, tokenizer_folder=EXAMPLE, vocab_size=vocabulary)
    assert found.token_ids.shape == (64, 2048)
    assert set(Counter(found.domains).values()) == {3, 6, 8, 9}
    assert set(found.measured_domains) == set(found.domains) >= {"code", "prose", "dialogue", "mathematics", "french"}


def test_the_same_seed_gives_the_same_domains(load: Any, tmp_path: Path) -> None:
    chosen = plan(write_rows(tmp_path / "a.jsonl", rows({"prose": 60, "code": 20})), samples=50)
    first, second = load(chosen), load(chosen)
    assert (first.domains, first.measured_domains) == (second.domains, second.measured_domains)
    assert torch.equal(first.token_ids, second.token_ids)
    assert torch.equal(first.measured_ids, second.measured_ids)


# What is measured


def test_without_a_measure_calibration_is_the_same_and_nothing_else_is_read(load: Any, tmp_path: Path) -> None:
    chosen = fitted(write_rows(tmp_path / "a.jsonl", distinct({"prose": 50, "code": 30}, length=6)), samples=40)
    found, measured = load(replace(chosen, measures=False)), load(chosen)
    assert (len(found.measured_ids), found.measured_domains) == (0, ())
    assert len(measured.measured_ids)
    assert torch.equal(found.token_ids, measured.token_ids)


def test_no_document_is_in_both_parts(load: Any, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", distinct({"prose": 50, "code": 30}, length=6))
    found = load(plan(file, samples=40, sequence_length=5))
    assert len(found.token_ids) == 40
    assert len(found.measured_ids)
    assert not documents(found.token_ids) & documents(found.measured_ids)


def test_a_document_that_is_there_twice_is_not_measured_on_once_it_has_been_seen(load: Any, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", distinct({"prose": 3}, length=7) * 20)
    found = load(plan(file, samples=40))
    assert not documents(found.token_ids) & documents(found.measured_ids)


@pytest.mark.parametrize(("samples", "measured"), [(2, 2), (100, 100), (520, 512)])
def test_as_much_text_as_calibrates_is_measured_on_but_at_most_16384_tokens(
    load: Any, tmp_path: Path, samples: int, measured: int
) -> None:
    file = write_texts(tmp_path / "a.jsonl", [text(number, 60) for number in range(1100)])
    found = load(plan(file, samples=samples, sequence_length=32))
    assert len(found.token_ids) == samples
    assert found.measured_ids.shape == (measured, 32)


def test_every_domain_is_measured_where_it_has_more_text(load: Any, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", rows({"prose": 90, "code": 9, "legal": 9}, length=9))
    found = load(plan(file, samples=80, sequence_length=8))
    assert set(found.measured_domains) == set(found.domains) == {"prose", "code", "legal"}


def test_samples_that_are_asked_for_are_all_calibrated_on(load: Any, tmp_path: Path) -> None:
    file = write_texts(tmp_path / "a.jsonl", [text(number, 7) for number in range(20)])
    found = load(fitted(file, samples=40))
    assert (len(found.token_ids), len(found.measured_ids)) == (40, 0)


def test_a_fit_holds_back_an_eighth_of_a_text_that_is_all_used(load: Any, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", distinct({"prose": 20}, length=7))
    found, plain = load(fitted(file)), load(plan(file, samples=40))
    assert (len(found.token_ids), len(found.measured_ids)) == (34, 6)
    assert torch.equal(found.token_ids, plain.token_ids[:34])
    assert not documents(found.token_ids) & documents(found.measured_ids)


def test_what_is_held_back_is_spread_over_domains(load: Any, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", distinct({"prose": 40, "code": 40}, length=7))
    found = load(fitted(file))
    assert Counter(found.measured_domains) == {"prose": 10, "code": 10}
    assert Counter(found.domains) == {"prose": 70, "code": 70}


def test_a_source_that_is_all_used_is_measured_next_to_one_that_is_not(load: Any, tmp_path: Path) -> None:
    short = write_rows(tmp_path / "short.jsonl", distinct({"prose": 20}, length=7))
    long = write_rows(tmp_path / "long.jsonl", distinct({"code": 90}, length=7))
    found = load(fitted(f"{short},{long}"))
    assert set(found.measured_domains) == {"prose", "code"}
    assert Counter(found.domains) == {"prose": 34, "code": 40}
    assert Counter(found.sources) == {0: 34, 1: 40}


def test_nothing_is_held_back_of_a_single_document(load: Any, tmp_path: Path) -> None:
    found = load(fitted(write_texts(tmp_path / "a.jsonl", [text(0, 99)])))
    assert (len(found.token_ids), len(found.measured_ids)) == (25, 0)


def test_nothing_is_held_back_of_three_sequences(load: Any, tmp_path: Path) -> None:
    found = load(fitted(write_texts(tmp_path / "a.jsonl", [text(number, 3) for number in range(3)])))
    assert (len(found.token_ids), len(found.measured_ids)) == (3, 0)
