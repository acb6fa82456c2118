"""The reference of ``hcsmoe convert`` and ``hcsmoe recover`` as a page.

``python -m hcsmoe_hub.cli.reference > docs/options.md`` writes it.
"""

import re
import sys
from collections.abc import Iterator
from enum import StrEnum
from typing import Any

import typer
from typer.core import TyperOption

from hcsmoe_hub import options
from hcsmoe_hub.cli.app import app
from hcsmoe_hub.cli.help_page import DEFAULT_PANEL, default_of, options_by_panel
from hcsmoe_hub.options import Preset
from hcsmoe_hub.recovery.options import Precision, Train

INTRODUCTION = """# Options of hcsmoe convert and hcsmoe recover

`hcsmoe convert` merges or prunes experts, and [`hcsmoe recover`](#options-of-hcsmoe-recover) trains the result.
Everyday options are also listed by `hcsmoe convert --help`, all of them by `hcsmoe convert --help-methods`.
[Methods](methods.md) explains the values. N is the number of experts per layer in the source, and K is `--experts`.

Options that would have no effect together with the others are rejected, never silently ignored. Method options that are
not given are taken from the preset.
"""
RECOVERY = """## Options of hcsmoe recover

The result and `--teacher` are checkpoints: folders or repositories of the Hub. [Recover](how-to/recover.md) explains
when and how to train a result.
"""
_TYPES = [value for value in vars(options).values() if isinstance(value, type)]
_ENUMS: list[type[StrEnum]] = [Preset, Precision, Train, *(kind for kind in _TYPES if issubclass(kind, StrEnum))]
_VALUES = {str(value) for kind in _ENUMS for value in kind} | {"bundled", "c4", "cuda:N"}
# What the help writes for a value, in words.
_KINDS = {"N": "integer, at least {min}", "": "flag"}


def reference() -> str:
    """The page: a table per panel, made from the options themselves."""
    group: Any = typer.main.get_command(app)
    conversion, recovery = (options_by_panel(group.commands[name].params) for name in ("convert", "recover"))
    return "\n".join([INTRODUCTION, *_tables(conversion), RECOVERY, *_tables(recovery, of=" of a recovery")])


def _tables(panels: dict[str, list[TyperOption]], *, of: str = "") -> Iterator[str]:
    """A table per panel; ``of`` follows its title, which must be the only one of its name on the page."""
    level = "###" if of else "##"
    for panel, members in panels.items():
        if panel != DEFAULT_PANEL:
            yield f"{level} {panel}{of}\n\n| option | values | default | meaning |\n|---|---|---|---|"
            yield from map(_row, members)
            yield ""


def _row(option: TyperOption) -> str:
    """One option. Its help ends with its values if it has a list of them."""
    text = (option.help or "").removesuffix(".")
    meaning, _, listed = text.partition(": ")
    if listed:
        # Square brackets would be read as links.
        values = re.sub(r"(^|, | or )([\w:+-]+)", lambda item: item[1] + _code(item[2]), listed).replace("[", "\\[")
    else:
        values = _KINDS.get(option.metavar or "", f"`{option.metavar}`").format(min=option.min)
    default = "required" if option.required else _default(option)
    names = ", ".join(f"`{name}`" for name in sorted(option.opts, key=len))
    return f"| {names} | {values} | {default} | {meaning.replace('*', chr(92) + '*')}. |"


def _code(word: str) -> str:
    return f"`{word}`" if word in _VALUES else word


def _default(option: TyperOption) -> str:
    """The default; one that the command line itself fills in is code."""
    default = default_of(option)
    return default if isinstance(option.show_default, str) or not default else f"`{default}`"


if __name__ == "__main__":
    sys.stdout.write(reference())
