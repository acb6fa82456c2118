"""Rebuild the bundled calibration file from openly licensed text.

Usage: ``python benchmarks/build_bundled_calibration.py CORPUS.jsonl [MORE.jsonl ...] [--output FILE]``

A corpus holds one JSON object a line with the keys ``text``, ``domain``, ``source`` and ``license``.
``benchmarks/bundled_corpus.py`` collects one from packages; the bundled file itself is another, which gives its own
records back. The result depends on these files alone: random numbers and the clock are not used. The provenance table
that ``hcsmoe_hub/calibration/data/README.md`` shows is written to standard output.
"""

import argparse
import hashlib
import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

Record = dict[str, str]
Pools = dict[str, dict[str, list[Record]]]

KEYS = ("text", "domain", "source", "license")
DEFAULT_OUTPUT = Path(__file__).resolve().parents[1] / "hcsmoe_hub" / "calibration" / "data" / "bundled.jsonl"
FILE_BYTES = 1_050_000
MIN_CHARACTERS, MAX_CHARACTERS = 400, 6_000

# The whole value has to match, so that "BSD / assorted" or "GPL-2+/BSD" are not mistaken for BSD-3-Clause.
PERMITTED_LICENSE = re.compile(
    r"(public domain|PSF-2\.0|BSD-3-Clause|PostgreSQL licence|MIT|MIT or Apache-2\.0|CC-BY-SA-3\.0)( \([^()]+\))?"
)
EMAIL = re.compile(r"[\w.+-]+@[\w-]+(\.[\w-]+)+")
# Code that a project copied from elsewhere may have a different licence from the project's.
TAKEN_OVER = re.compile(r"\b(adapted|copied|taken|borrowed|ported) from\b", re.IGNORECASE)
DEFINITION = re.compile(
    r"^\s*(async def|def|class|pub|fn|impl|function|static|int|void|module\.|CREATE)\b|^\w+\(\) \{", re.MULTILINE
)
# Authors of the sources, who are named in NOTICE.
AUTHOR = re.compile(r"Hertzog|Roland Mas\b|Copyright|\(c\) \d{4}")
# Links to the pages around a page, and logs that name real hosts.
NAVIGATION = re.compile(r"^\S+\n\n[^\n]+\n\n\S+\n\n")
LOG = re.compile(r"\b\d{1,3}(\.\d{1,3}){3} - - \[")
WORD = re.compile(r"\w+")


def has_odd_characters(text: str) -> bool:
    """Whether a text contains control, format, private, unassigned or replacement characters."""
    return any(char == "\ufffd" or (char not in "\n\t" and unicodedata.category(char).startswith("C")) for char in text)


def is_eligible(record: Record) -> bool:
    """Whether a record may be shipped and is worth shipping."""
    text = record["text"]
    if not PERMITTED_LICENSE.fullmatch(record["license"]):
        return False
    if not MIN_CHARACTERS <= len(text) <= MAX_CHARACTERS:
        return False
    if any(pattern.search(text) for pattern in (EMAIL, AUTHOR, NAVIGATION, LOG)) or has_odd_characters(text):
        return False
    # Code without any definition is mostly import tables and lists of exported names.
    return record["domain"] != "code" or (bool(DEFINITION.search(text)) and not TAKEN_OVER.search(text))


def load_pools(corpora: Sequence[Path]) -> Pools:
    """Read the corpora and return their eligible records without duplicates, by domain and source."""
    pools: Pools = defaultdict(lambda: defaultdict(list))
    seen: set[str] = set()
    for corpus in corpora:
        for line in corpus.read_text("utf-8").split("\n"):
            if not line:
                continue
            record = json.loads(line)
            normalised = " ".join(record["text"].split())
            if normalised not in seen and is_eligible(record):
                seen.add(normalised)
                pools[record["domain"]][record["source"]].append({key: record[key] for key in KEYS})
    return pools


def pop_newest(candidates: list[Record], known: set[str]) -> Record:
    """Remove and return the candidate with the least share of known words, and add its words to them.

    Excerpts of one document share its names and terms, so this moves on to another document of the source
    before it comes back to one that is there already. The digest settles ties and the first choice.
    """

    def rank(record: Record) -> tuple[float, str]:
        words = set(WORD.findall(record["text"]))
        return len(words & known) / max(1, len(words)), hashlib.sha256(record["text"].encode()).hexdigest()

    chosen = min(candidates, key=rank)
    candidates.remove(chosen)
    known.update(WORD.findall(chosen["text"]))
    return chosen


def select(pools: Pools) -> list[tuple[Record, str]]:
    """Return the chosen records with their JSON lines, in file order.

    The next record always comes from the domain with the fewest bytes so far, and there from the source with
    the fewest bytes so far. This balances the file and every prefix of it, and a small source is used up
    before a large one gets more than an equal part. It ends when a domain runs out or the file is full.
    """
    chosen: list[tuple[Record, str]] = []
    size: Counter[tuple[str, ...]] = Counter()
    known: dict[tuple[str, str], set[str]] = defaultdict(set)
    total = 0
    while pools:
        domain = min(sorted(pools), key=lambda name: size[(name,)])
        sources = sorted(name for name, records in pools[domain].items() if records)
        if not sources:
            break
        source = min(sources, key=lambda name: size[(domain, name)])
        record = pop_newest(pools[domain][source], known[(domain, source)])
        line = json.dumps(record, ensure_ascii=False) + "\n"
        length = len(line.encode())
        if total + length > FILE_BYTES:
            break
        total += length
        size.update({(domain,): length, (domain, source): length})
        chosen.append((record, line))
    return chosen


def provenance(chosen: list[tuple[Record, str]]) -> str:
    """Return the Markdown table of sources; the bytes are those of the lines and add up to the file."""
    table = ["| Domain | Source | Licence | Records | Bytes |", "|---|---|---|---:|---:|"]

    def add_row(domain: str, source: str, license_name: str, lines: list[str]) -> None:
        size = sum(len(line.encode()) for line in lines)
        table.append(f"| {domain} | {source} | {license_name} | {len(lines)} | {size} |")

    groups: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for record, line in chosen:
        groups[(record["domain"], record["source"], record["license"])].append(line)
    for group in sorted(groups):
        add_row(*group, groups[group])
    for domain in sorted({group[0] for group in groups}):
        add_row(domain, "all", "", [line for record, line in chosen if record["domain"] == domain])
    add_row("all", "all", "", [line for _, line in chosen])
    return "\n".join(table)


def main() -> None:
    """Write the bundled file and print where its records come from."""
    parser = argparse.ArgumentParser(description="Rebuild the bundled calibration file.")
    parser.add_argument("corpora", nargs="+", type=Path, help="JSON Lines file with text, domain, source and license")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="file to write")
    args = parser.parse_args()
    chosen = select(load_pools(args.corpora))
    data = "".join(line for _, line in chosen).encode()
    args.output.write_bytes(data)
    print(provenance(chosen))
    print(f"\nsha256 {hashlib.sha256(data).hexdigest()}, {len(data)} bytes, {len(chosen)} records")


if __name__ == "__main__":
    main()
