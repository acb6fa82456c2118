"""Help pages that fit their terminal: names on the left, sentences on the right, broken only between words."""

import inspect
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

# Panels that the everyday page leaves out; --help-methods shows them.
RARE_PANELS = ("Grouping", "Merging", "Pruning", "Layers and router")
# Panel of the options that name none.
DEFAULT_PANEL = "Options"
# Options of other panels that few people need, left out in the same way.
RARE_OPTIONS = frozenset(
    {
        "--experts-per-token",
        "--refit-passes",
        "--source-length",
        "--text-column",
        "--feature-tokens",
        "--no-states",
        "--batch-tokens",
        "--mtp",
        "--max-shard-size",
        "--create-pr",
        "--cache-dir",
    }
)
# The option that shows all of them.
ALL_OPTIONS = "--help-methods"
# Name of a page's setting in the context of its command.
SHOWS_RARE = "hcsmoe.shows_rare"

INDENT, GAP = 2, 2
# Room for the names; a longer one gets a line of its own.
MAX_NAMES = 26

# Defaults and the like, which may go on in the next line.
NOTES = r"\[(?:default|env|required)[^\]]*\]"
# What a person types starts with this; it is continued with a backslash where it is too long for one line.
PROMPT = "$ "

Entry = tuple[str, str]
Parameter = TyperArgument | TyperOption


class HelpCommand(TyperCommand):
    """A command whose help is a page of this kind."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The words after the command's name: arguments by their plain names."""
        return ["[OPTIONS]", *(argument.display_name_raw for argument in _arguments(self.get_params(ctx)))]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Prints the page. Typer's own does the same, so that colours follow the terminal."""
        _print(_page(self, ctx))


class HelpGroup(TyperGroup):
    """An application whose help is a page of this kind."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Prints the page, with every command in a sentence."""
        commands = [(name, command.help or "") for name, command in self.commands.items()]
        _print([*_page(self, ctx), ("Commands", commands)])


def show_rare(ctx: typer.Context, wanted: bool) -> None:
    """Callback of ``--help-methods``: prints the page with all its panels and ends the command."""
    if wanted:
        ctx.meta[SHOWS_RARE] = True
        ctx.get_help()
        raise typer.Exit


def options_by_panel(parameters: Iterable[Any]) -> dict[str, list[TyperOption]]:
    """The options that are not hidden, in the panels that they name, in the order of the panels' first options."""
    panels: dict[str, list[TyperOption]] = {}
    for parameter in parameters:
        if isinstance(parameter, TyperOption) and not parameter.hidden:
            panels.setdefault(parameter.rich_help_panel or DEFAULT_PANEL, []).append(parameter)
    return panels


def one_of(values: Iterable[str]) -> str:
    """Values as a sentence names them: ``a, b or c``."""
    *others, last = values
    return f"{', '.join(others)} or {last}"


def default_of(parameter: Parameter) -> str:
    """The default value in words; empty if there is none worth showing."""
    if isinstance(parameter.show_default, str):
        return parameter.show_default
    is_worth_it = parameter.show_default and parameter.default not in (None, False)
    return str(parameter.default) if is_worth_it else ""


def _arguments(parameters: Iterable[Any]) -> list[TyperArgument]:
    return [parameter for parameter in parameters if isinstance(parameter, TyperArgument)]


def _page(command: Any, ctx: Any) -> list[tuple[str, list[Entry]]]:
    """Titles and entries of a page; a title without entries is a paragraph."""
    parameters = command.get_params(ctx)
    blocks: list[tuple[str, list[Entry]]] = [(command.get_usage(ctx), []), (inspect.cleandoc(command.help or ""), [])]
    if arguments := _arguments(parameters):
        blocks.append(("Arguments", [(argument.display_name_raw, _sentence(argument)) for argument in arguments]))
    panels = options_by_panel(parameters)
    has_page_of_all = any(ALL_OPTIONS in option.opts for option in panels.get(DEFAULT_PANEL, ()))
    shows_all = SHOWS_RARE in ctx.meta or not has_page_of_all
    for panel in sorted(panels, key=lambda name: name != DEFAULT_PANEL):
        shown = [option for option in panels[panel] if shows_all or not (panel in RARE_PANELS or _is_rare(option))]
        if shown:
            blocks.append((panel, [(_names(option), _sentence(option)) for option in shown]))
    if command.epilog:
        blocks.append((command.epilog, []))
    return blocks


def _is_rare(option: TyperOption) -> bool:
    return not RARE_OPTIONS.isdisjoint(option.opts)


def _names(option: TyperOption) -> str:
    """Short name, long name, and what stands for its value."""
    names = ", ".join(sorted(option.opts, key=len))
    return f"{names} {option.metavar}" if option.metavar else names


def _sentence(parameter: Parameter) -> str:
    """What a parameter means, and its default."""
    parts = [parameter.help or ""]
    if parameter.envvar and isinstance(parameter.envvar, str):
        parts.append(f"[env: {parameter.envvar}]")
    if default := default_of(parameter):
        parts.append(f"[default: {default}]")
    if parameter.required:
        parts.append("[required]")
    return " ".join(filter(None, parts))


def _print(blocks: Sequence[tuple[str, list[Entry]]]) -> None:
    console = Console(highlight=False, markup=False, emoji=False)
    lines = [line for title, entries in blocks for line in _block(title, entries, console.width)]
    page = Text("\n").join(lines[:-1])
    page.highlight_regex(NOTES, "dim")
    console.print(page, soft_wrap=True)


def _block(title: str, entries: Sequence[Entry], width: int) -> Iterator[Text]:
    """A paragraph, or a heading with its entries; and an empty line."""
    if entries:
        yield Text(title, "bold")
        room = min(MAX_NAMES, max(len(name) for name, _ in entries))
        for name, sentence in entries:
            yield from _entry(name, sentence, room, width)
    else:
        for line in title.splitlines():
            yield from map(Text, _command(line, width) if line.startswith(PROMPT) else _wrap(line, width))
    yield Text()


def _entry(name: str, sentence: str, room: int, width: int) -> Iterator[Text]:
    """A name, and its sentence next to it; below it if the name takes more than its room."""
    margin = INDENT + room + GAP
    lines = _wrap(sentence, width - margin)
    first = lines.pop(0) if len(name) <= room and lines else ""
    yield Text.assemble(
        " " * INDENT, (name, "bold cyan"), f"{'':{margin - INDENT - len(name)}}{first}" if first else ""
    )
    for line in lines:
        yield Text(" " * margin + line)


def _command(line: str, width: int) -> list[str]:
    """A command to copy, continued on lines of its own where it is too long."""
    rows = _wrap(line, width - len(" \\"), hanging=" " * 4)
    return [*(f"{row} \\" for row in rows[:-1]), rows[-1]]


def _wrap(text: str, width: int, hanging: str = "") -> list[str]:
    """Lines of whole words: a value such as ``fix-dom`` is one."""
    return textwrap.wrap(text, width, subsequent_indent=hanging, break_long_words=False, break_on_hyphens=False)
