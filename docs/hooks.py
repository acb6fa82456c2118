"""Fills the architecture page from what is in force: the import contracts of pyproject.toml, and module docstrings."""

import ast
import textwrap
import tomllib
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = "architecture.md"
WIDTH, TEXT_LEFT, LINE, MARGIN = 900, 140, 18, 10
# Characters of a sentence that fit between its box and the right edge.
TEXT_COLUMNS = 88


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Called by mkdocs with the source of every page."""
    return fill(markdown) if page.file.src_uri == PAGE else markdown


def fill(markdown: str) -> str:
    """Replaces the markers of the architecture page."""
    contracts = read_contracts()
    layers = next(each["layers"] for each in contracts if each["type"] == "layers")
    parts = {"layers": draw(layers), "rules": "\n".join(rules(contracts)), "files": "\n".join(map_of_files(layers))}
    for name, part in parts.items():
        marker = f"<!-- {name} -->"
        assert marker in markdown, f"{PAGE} has no {marker}"
        markdown = markdown.replace(marker, part)
    return markdown


def read_contracts() -> list[dict[str, Any]]:
    """The contracts that import-linter enforces."""
    contracts: list[dict[str, Any]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"][
        "contracts"
    ]
    return contracts


def rooms(layer: str) -> list[str]:
    """The modules of one layer, which do not import each other."""
    return [name.strip() for name in layer.split("|")]


def place(room: str) -> Path:
    """Folder or file that holds a room: two of them lie next to the library, not in it."""
    found = [path for path in (ROOT / "hcsmoe_hub" / room, ROOT / room) if (path / "__init__.py").is_file()]
    return found[0] if found else ROOT / "hcsmoe_hub" / f"{room}.py"


def sentence(file: Path) -> str:
    """First paragraph of a module's docstring."""
    text = ast.get_docstring(ast.parse(file.read_text("utf-8")))
    assert text, f"{file} has no docstring"
    return " ".join(text.split("\n\n")[0].split())


def about(room: str) -> str:
    """What a room is for."""
    path = place(room)
    return sentence(path / "__init__.py" if path.is_dir() else path)


def draw(layers: list[str]) -> str:
    """The layers as an SVG, the highest first; its colours are those of the page."""
    shapes, top = list[str](), 1
    for layer in layers:
        lines = [(room, textwrap.wrap(about(room), TEXT_COLUMNS)) for room in rooms(layer)]
        height = sum(len(text) * LINE for _, text in lines) + 2 * MARGIN
        shapes.append(
            f'<rect x="1" y="{top}" width="{WIDTH - 2}" height="{height}" rx="6" fill="currentColor" '
            'fill-opacity="0.05" stroke="currentColor" stroke-opacity="0.35"/>'
        )
        baseline = top + MARGIN + LINE - 5
        for room, text in lines:
            shapes.append(f'<text x="14" y="{baseline}" font-weight="700">{escape(room)}</text>')
            for line in text:
                shapes.append(f'<text x="{TEXT_LEFT}" y="{baseline}">{escape(line)}</text>')
                baseline += LINE
        top += height + 6
    return "\n".join(
        [
            f'<figure class="layers"><svg viewBox="0 0 {WIDTH} {top}" width="100%" font-size="13.5" '
            'fill="currentColor" font-family="inherit" role="img" aria-label="Layers of hcsmoe_hub">',
            *shapes,
            "</svg></figure>",
        ]
    )


def rules(contracts: list[dict[str, Any]]) -> Iterator[str]:
    """One item per contract besides the layers."""
    for each in contracts:
        if each["type"] == "forbidden":
            sources, banned = (
                ", ".join(f"`{name.removeprefix('hcsmoe_hub.')}`" for name in each[key])
                for key in ("source_modules", "forbidden_modules")
            )
            where = sources if len(each["source_modules"]) < 4 else "everything but `cli`"
            yield f"- **{each['name']}.** No import of {banned} in {where}."


def map_of_files(layers: list[str]) -> Iterator[str]:
    """A table per folder: every file, and what its docstring says first."""
    for layer in layers:
        for room in rooms(layer):
            top = place(room)
            if not top.is_dir():
                continue
            yield from (f"### `{room}`", "", "| file | what it is |", "|---|---|")
            for file in sorted(top.rglob("*.py")):
                if file != top / "__init__.py":
                    # A bar would end the cell.
                    text = sentence(file).replace("|", "\\|")
                    yield f"| `{file.relative_to(top).as_posix()}` | {text} |"
            yield ""
