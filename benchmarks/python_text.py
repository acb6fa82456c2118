"""Text for training, calibration and evaluation that every installation of Python carries, in three parts.

No paragraph of prose occurs twice, and all documents of a module, package or help topic go to one part: training,
calibration or held-out text.
"""

import ast
import hashlib
import io
import itertools
import json
import random
import re
import sysconfig
import textwrap
import tokenize
from collections import defaultdict
from collections.abc import Iterable, Iterator
from importlib.metadata import distributions
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data", "__pycache__"}
LEGAL = re.compile(r"copyright|licen[sc]e|warrant|permission", re.IGNORECASE)
MIN_CHARACTERS, MAX_CHARACTERS = 300, 4_000
CONTEXT_WORDS, CHOICE_WORDS = 45, 25
# With packages: files of each, so that no large one prevails; size of a document, and of a domain in each part.
PACKAGE_FILES, DOCUMENT_CHARACTERS, DOMAIN_CHARACTERS = 40, 64_000, 5_000_000


class Document(NamedTuple):
    """A text, and where it belongs.

    Attributes:
        place: Name of the module, package or help topic; it decides the part.
        domain: Kind of text.
        text: The text.
    """

    place: str
    domain: str
    text: str


def paragraphs(text: str) -> Iterator[str]:
    """The paragraphs that read like prose, each on one line: without examples, tables, code or legal notices."""
    for block in re.split(r"\n\s*\n", text):
        line = " ".join(block.split())
        letters = sum(character.isalpha() or character in " ,." for character in line)
        if len(line.split()) >= 4 and letters >= 0.88 * len(line) and not LEGAL.search(line) and ">>>" not in line:
            yield line


def comments(source: str) -> Iterator[tuple[int, str]]:
    """First line and text of every block of full-line comments."""
    block: list[str] = []
    start = end = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT or not token.line.lstrip().startswith("#"):
            continue
        if token.start[0] != end + 1:
            yield start, "\n".join(block)
            block, start = [], token.start[0]
        block.append(token.string.lstrip("#!: "))
        end = token.start[0]
    yield start, "\n".join(block)


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of every docstring; that of a function begins with the function's name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef) and (text := ast.get_docstring(node)):
            yield node.body[0].lineno, text
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (text := ast.get_docstring(node)):
            yield node.body[0].lineno, f"{node.name}: {text}"


def code_alone(tree: ast.Module) -> str:
    """The code of a module without its comments and docstrings; takes the docstrings out of ``tree``."""
    for node in ast.walk(tree):
        is_scope = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if is_scope and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def modules(root: Path, found: Iterable[Path]) -> Iterator[tuple[str, str, ast.Module]]:
    """Dotted name, source and syntax tree of the Python files below a folder that this Python can parse."""
    for file in found:
        place = file.relative_to(root).with_suffix("")
        if SKIPPED.intersection(place.parts):
            continue
        try:
            with tokenize.open(file) as lines:
                source = lines.read()
            tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):
            # Packages carry templates, and samples for parsers.
            continue
        yield ".".join(place.parts), source, tree


def prose(source: str, tree: ast.Module) -> dict[str, str]:
    """Docstrings and comments of a module by class, and under the empty name those outside classes."""
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    pieces: defaultdict[str, list[str]] = defaultdict(list)
    for line, text in sorted([*docstrings(tree), *comments(source)]):
        inside = [node.name for node in classes if node.lineno <= line <= (node.end_lineno or 0)]
        pieces[inside[0] if inside else ""].append(text)
    return {name: "\n\n".join(texts) for name, texts in pieces.items()}


def library() -> Iterator[Document]:
    """The prose of the standard library: domains ``module``, ``class`` and ``topic``."""
    root = Path(sysconfig.get_path("stdlib"))
    for place, source, tree in modules(root, sorted(root.rglob("*.py"))):
        for name, text in prose(source, tree).items():
            yield Document(place, "class" if name else "module", text)
    for name, text in sorted(topics.items()):
        yield Document(f"help({name})", "topic", text)


def installed() -> Iterator[Document]:
    """Prose, code and manuals of the standard library and of the installed packages.

    A package is one place as a whole, since its modules resemble each other.
    """
    root = Path(sysconfig.get_path("stdlib"))
    for place, source, tree in modules(root, sorted(root.rglob("*.py"))):
        yield from _prose_and_code(place, source, tree)
    packages = Path(sysconfig.get_path("purelib"))
    for folder in sorted(path for path in packages.iterdir() if (path / "__init__.py").exists()):
        inside = [file for file in sorted(folder.rglob("*.py")) if not SKIPPED.intersection(file.parent.parts[-2:])]
        for _, source, tree in modules(packages, spaced(inside, PACKAGE_FILES)):
            yield from _prose_and_code(f"{folder.name} (package)", source, tree)
    for name, text in sorted(topics.items()):
        yield Document(f"help({name})", "manual", text)
    for item in sorted(distributions(), key=lambda item: item.name):
        # The long description, which is usually the package's README.
        yield Document(f"{item.name} (package)", "manual", str(item.metadata.get_payload()))


def _prose_and_code(place: str, source: str, tree: ast.Module) -> Iterator[Document]:
    yield from (Document(place, "prose", text) for text in prose(source, tree).values())
    yield Document(place, "code", code_alone(tree))


def documents(*, packages: bool) -> dict[str, list[Document]]:
    """The documents of every part, by a hash of the module's name; repeated paragraphs of prose are left out.

    Args:
        packages: Take code and manuals too, and those of installed packages, not only the standard library's prose.
    """
    parts: dict[str, list[Document]] = {"training": [], "calibration": [], "heldout": []}
    seen: set[str] = set()
    for place, domain, raw in installed() if packages else library():
        if domain in ("code", "manual"):
            text = "" if raw in seen else raw
            seen.add(raw)
        else:
            kept = [line for line in dict.fromkeys(paragraphs(raw)) if line not in seen]
            seen.update(kept)
            text = "\n".join(kept)
        number = int(hashlib.sha256(place.encode()).hexdigest(), 16) % 100
        part = "calibration" if number < 14 else "heldout" if number < 24 else "training"
        if text.strip():
            parts[part].append(Document(place, domain, text))
    return {part: balanced(found) for part, found in parts.items()} if packages else parts


def balanced(found: list[Document]) -> list[Document]:
    """Evenly spaced documents of every domain, up to a total size; of long documents, the beginning."""
    kept = []
    for same in by_domain(found).values():
        mine = [document._replace(text=document.text[:DOCUMENT_CHARACTERS]) for document in same]
        size = sum(len(document.text) for document in mine)
        kept += spaced(mine, max(1, len(mine) * DOMAIN_CHARACTERS // max(size, DOMAIN_CHARACTERS)))
    return kept


def spaced(things: list[Any], count: int) -> list[Any]:
    """At most ``count`` evenly spaced items."""
    return [things[number * len(things) // count] for number in range(count)] if count < len(things) else things


def records(found: list[Document], count: int) -> list[dict[str, Any]]:
    """Evenly spaced pieces of some length, cut at the ends of words; code keeps its lines."""
    pieces = [
        {"text": text, "domain": document.domain}
        for document in found
        for text in cut(document)
        if len(text) >= MIN_CHARACTERS
    ]
    return spaced(pieces, count)


def cut(document: Document) -> list[str]:
    """Pieces of a document of at most ``MAX_CHARACTERS``."""
    if document.domain not in ("code", "manual"):
        return textwrap.wrap(document.text, MAX_CHARACTERS, replace_whitespace=False, break_on_hyphens=False)
    pieces = [""]
    for line in document.text.splitlines(keepends=True):
        if pieces[-1] and len(pieces[-1]) + len(line) > MAX_CHARACTERS:
            pieces.append("")
        pieces[-1] += line[:MAX_CHARACTERS]
    return pieces


def choices(found: list[Document], count: int, seed: int) -> list[dict[str, Any]]:
    """Items that ask for the continuation of a passage, among continuations of three other passages of its domain."""
    passages: list[tuple[str, str, str, str]] = []
    size = CONTEXT_WORDS + CHOICE_WORDS
    for document in found:
        # Lines matter in code only.
        words = re.findall(r"\s*\S+", document.text) if document.domain == "code" else spelled(document.text.split())
        for start in range(0, len(words) - size + 1, size):
            context, true = words[start : start + CONTEXT_WORDS], words[start + CONTEXT_WORDS : start + size]
            passages.append((document.text, document.domain, "".join(context).lstrip(), "".join(true)))
    chance = random.Random(seed)
    items: list[dict[str, Any]] = []
    for text, domain, question, answer in spaced(passages, count):
        mixed = chance.sample(passages, len(passages))
        others = {other: wrong for other, kind, _, wrong in mixed if other != text and kind == domain}
        options = [answer, *itertools.islice(others.values(), 3)]
        chance.shuffle(options)
        items.append({"context": question, "choices": options, "gold": options.index(answer), "domain": domain})
    return items


def spelled(words: list[str]) -> list[str]:
    """Words with the space before each."""
    return [f" {word}" for word in words]


def by_domain(found: list[Document]) -> dict[str, list[Document]]:
    """The documents of each domain."""
    names = dict.fromkeys(document.domain for document in found)
    return {name: [document for document in found if document.domain == name] for name in names}


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    """Writes records, one JSON object a line."""
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    print(f"{file}: {len(rows)} records")
