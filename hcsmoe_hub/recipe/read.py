"""Reads the method of a report back into a recipe."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, get_args, get_type_hints

from hcsmoe_hub.errors import SourceError
from hcsmoe_hub.options import Align, AlignTo, FormerRefit
from hcsmoe_hub.recipe.recipe import Recipe


def read_recipe(method: Mapping[str, Any]) -> Recipe:
    """The recipe that a report records; the inverse of ``Recipe.as_dict``.

    Args:
        method: ``method`` of ``hcsmoe.json``; a key that early reports lack counts as null.

    Raises:
        SourceError: If it names a choice that this version does not know.
    """
    found = {name: _value(name, hint, method.get(name)) for name, hint in get_type_hints(Recipe).items()}
    if found["align"] not in (None, Align.NONE) and found["align_to"] is None:
        # Versions that did not record it aligned to the dominant expert.
        found["align_to"] = AlignTo.DOMINANT
    return Recipe(**found)


def _value(name: str, hint: Any, value: Any) -> Any:
    enum = _enum_of(hint)
    match name:
        case "protect":
            return _protected(value)
        case "refit" if value in set(FormerRefit):
            return FormerRefit(value)
        case "similarity" if value is not None and enum is not None:
            return tuple(_member(enum, name, word) for word in value.split("+"))
        case _ if value is None:
            return None
        case _ if enum is not None:
            return _member(enum, name, value)
        case _:
            return tuple(value) if isinstance(value, list) else value


def _enum_of(hint: Any) -> type[StrEnum] | None:
    """The enum in ``E``, ``E | None`` or ``tuple[E, ...] | None``."""
    kinds = [kind for part in (hint, *get_args(hint)) for kind in (part, *get_args(part))]
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, StrEnum)), None)


def _member(enum: type[StrEnum], name: str, word: str) -> StrEnum:
    try:
        return enum(word)
    except ValueError:
        raise SourceError(
            f"the report names the {name} {word!r}, which this version of hcsmoe does not know.",
            hint="use a newer hcsmoe",
        ) from None


def _protected(text: str | None) -> tuple[tuple[int | None, int], ...]:
    """Pairs of ``3:17,*:0``."""
    try:
        pairs = [item.split(":") for item in (text or "").split(",") if item]
        return tuple((None if layer == "*" else int(layer), int(expert)) for layer, expert in pairs)
    except ValueError as error:
        raise SourceError(
            f"the report protects the experts {text!r}, which is not a list of LAYER:EXPERT.",
            hint="download it again, or repeat the conversion",
        ) from error
