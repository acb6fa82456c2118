"""Reads JSON of a declared shape, and says what is wrong with one message that names the key."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")

# What pydantic expected, in words.
_EXPECTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "int_parsing_size": "an integer",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "dataclass_type": "an object",
}
_SHOWN = 40
# It takes milliseconds to make what checks values of one class.
_adapter: Callable[[Any], TypeAdapter[Any]] = cache(TypeAdapter)
# Reports on a hundred layers of hundreds of experts have half of it; Python may need 25 times as much for it.
MAX_BYTES = 20_000_000


def read_small(path: Path) -> str:
    """The text of a file of JSON that should not be large.

    Raises:
        ValueError: If it is, or is not UTF-8 text.
        OSError: If it cannot be read.
    """
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES} bytes, which no such file needs")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError("it is not UTF-8 text") from error


def parse_json(text: str) -> dict[str, Any]:
    """Parses a JSON object.

    Raises:
        ValueError: If the text is too long, is not JSON, or is another kind of value.
    """
    if len(text) > MAX_BYTES:
        raise ValueError(f"it has {len(text)} bytes, and no such file needs more than {MAX_BYTES}")
    try:
        content = json.loads(text, parse_constant=_refuse)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON ({error})") from error
    except RecursionError as error:
        raise ValueError("it is not JSON that can be read (it is nested too deeply)") from error
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    return content


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number in JSON")


def conform(content: dict[str, Any], kind: type[T]) -> T:
    """Builds a dataclass or a typed dictionary from JSON values; keys that it does not declare are left out.

    Args:
        content: The values.
        kind: The class.

    Raises:
        ValueError: If a key is missing, or a value is of another kind; the message names it.
    """
    try:
        found: T = _adapter(kind).validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        problem = error.errors()[0]
        raise ValueError(_in_words(content, problem["loc"], problem["type"], problem["msg"])) from error
    return found


def _in_words(content: Any, location: tuple[int | str, ...], kind: str, message: str) -> str:
    """What is wrong at a location: ``layers[3].labels is missing``."""
    path = ""
    for step in location:
        # A location also names the member of a union that was tried, which is not a key.
        if not _holds(content, step) and kind != "missing":
            break
        path += f"[{step}]" if isinstance(step, int) else f".{step}"
        content = content[step] if _holds(content, step) else None
    path = path.removeprefix(".")
    if kind == "missing":
        return f"{path} is missing"
    shown = json.dumps(content)
    shown = shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN - 3]}..."
    expected = _EXPECTED.get(kind)
    return f"{path} is {shown}: {message}" if expected is None else f"{path} is {shown}, not {expected}"


def _holds(content: Any, step: int | str) -> bool:
    if isinstance(content, dict):
        return step in content
    return isinstance(content, list) and isinstance(step, int) and step < len(content)
