"""The rows of the papers' tables on the example model, with text from this repository in place of data sets.

A row keeps its method, and the share of the experts that it keeps. The bundled calibration text is divided: three
quarters of the records of four domains are calibrated on, the others are held out. Questions are cut from held-out
text: which of four phrases continues a passage.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from paper_commands import Commands
from paper_data import Data, Table
from paper_report import label, share
from quality_tables import table as markdown

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny-mixtral"
MODEL, EXPERTS = "example", 8
# What the example was trained on.
DOMAINS = ("code", "french", "manual", "prose")
# The domain that takes the place of a text that a row names.
NAMED = {"math.jsonl": "mathematics", "codeqa.jsonl": "code"}
CALIBRATION, HELD_OUT, QUESTIONS = "text.jsonl", "heldout.jsonl", "questions.jsonl"
# Every record of this number is held out.
EVERY = 4
CHARACTERS = 500
CONTEXT, PHRASE, CHOICES, PER_RECORD = 24, 8, 4, 2


def scaled(data: Data) -> Data:
    """The tables with the example in place of every model, and the same shares of its experts."""
    tables = tuple(_scaled(table, data.models[table.model]["experts"]) for table in data.tables)
    return replace(data, tables=tables, models={MODEL: {"repository": str(EXAMPLE), "experts": EXPERTS}})


def _scaled(table: Table, experts: int) -> Table:
    rows = tuple(replace(row, experts=round(EXPERTS * row.experts / experts)) for row in table.rows)
    return replace(table, model=MODEL, rows=rows)


def commands(data: Data, folder: Path, samples: int) -> Commands:
    """Commands for the small version; the texts are written into the folder.

    Args:
        data: What ``scaled`` returns.
        folder: Where texts and results go.
        samples: Sequences of calibration text.
    """
    texts = folder / "texts"
    texts.mkdir(parents=True, exist_ok=True)
    write_texts(texts)
    return Commands(
        data=data,
        folder=folder,
        calibration=str(texts / CALIBRATION),
        texts=texts,
        samples=samples,
        measures=("--perplexity", str(texts / HELD_OUT), "--choices", str(texts / QUESTIONS)),
    )


def write_texts(folder: Path) -> None:
    """Writes calibration text, held-out text and questions; the same bytes every time."""
    bundled = (files("hcsmoe_hub.calibration") / "data" / "bundled.jsonl").read_text("utf-8")
    by_domain: defaultdict[str, list[str]] = defaultdict(list)
    for line in bundled.splitlines():
        record = json.loads(line)
        by_domain[record["domain"]].append(record["text"])
    held_out = {domain: by_domain[domain][::EVERY] for domain in DOMAINS}
    rest = {
        domain: [text for number, text in enumerate(texts) if domain not in DOMAINS or number % EVERY]
        for domain, texts in by_domain.items()
    }
    _save(folder / CALIBRATION, _records({domain: rest[domain] for domain in DOMAINS}))
    for name, domain in NAMED.items():
        _save(folder / name, _records({domain: rest[domain]}))
    _save(folder / HELD_OUT, _records({domain: [text[:CHARACTERS] for text in held_out[domain]] for domain in DOMAINS}))
    _save(folder / QUESTIONS, [question for domain in DOMAINS for question in questions(held_out[domain], domain)])


def questions(texts: Sequence[str], domain: str) -> list[dict[str, Any]]:
    """Questions of passages of one domain; the wrong phrases come from other passages of the same."""
    size = CONTEXT + PHRASE
    passages = [
        (" ".join(words[start : start + CONTEXT]), " " + " ".join(words[start + CONTEXT : start + size]))
        for words in map(str.split, texts)
        for start in range(0, min(len(words) - size, PER_RECORD * size), size)
    ]
    found = []
    for number, (context, _) in enumerate(passages):
        # Far apart, so that most come from other records.
        step = len(passages) // CHOICES
        gold = number % CHOICES
        others = [passages[(number + (choice - gold) * step) % len(passages)][1] for choice in range(CHOICES)]
        found.append({"context": context, "choices": others, "gold": gold, "domain": domain})
    return found


def _records(texts: Mapping[str, Iterable[str]]) -> list[dict[str, Any]]:
    return [{"text": text, "domain": domain} for domain, found in texts.items() for text in found]


def _save(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def figures(measures: Mapping[str, Any]) -> dict[str, float]:
    """Perplexity, and the share of the questions answered right with its standard error."""
    choices = measures["choices"]["model"]["overall"]
    return {
        "perplexity": round(measures["perplexity"]["model"]["overall"]["perplexity"], 4),
        "accuracy": round(choices["accuracy"], 4),
        "accuracy_stderr": round(choices["accuracy_stderr"], 4),
    }


def small_table(table: Table, found: Mapping[str, Mapping[str, float]]) -> str:
    """A table with the figures of the example, by the names of conversions, next to the paper's mean for its model."""
    rows = []
    for row in table.rows:
        own = found[table.conversion(row).name]
        accuracy = f"{100 * own['accuracy']:.1f} ±{100 * own['accuracy_stderr']:.1f}"
        rows.append([label(row), f"{own['perplexity']:.2f}", accuracy, share(row.average)])
    return markdown(["experts of 8, method", "perplexity", "questions", "the paper's mean, on its own model"], rows)
