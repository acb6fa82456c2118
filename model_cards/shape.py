"""Checks that a JSON document is of the shape that a card is drawn from."""

from typing import Any

ANY_KEY = "*"
OPTIONAL = "?"
# JSON has one kind of number, Python two.
KINDS: dict[Any, tuple[type, ...]] = {float: (int, float), int: (int,), str: (str,), bool: (bool,), dict: (dict,)}


def conform(value: Any, shape: Any, where: str) -> None:
    """Checks a value and everything in it.

    Args:
        value: JSON value.
        shape: A type; a tuple of shapes, one of which it must have, ``None`` among them standing for null; a list of
            one shape, which every item must have; or a dict of shapes by key. There, ``*`` stands for every other key,
            and a key that ends with ``?`` may be missing. Keys that a dict of shapes does not name may be there.
        where: Name of the value, for the message.

    Raises:
        ValueError: If it is of another shape.
    """
    match shape:
        case dict():
            conform(value, dict, where)
            _conform_keys(value, shape, where)
        case [item]:
            if not isinstance(value, list):
                raise ValueError(f"{where} is no list")
            for number, entry in enumerate(value):
                conform(entry, item, f"{where}[{number}]")
        case (first, None):
            if value is not None:
                conform(value, first, where)
        case _:
            is_other = isinstance(value, bool) and shape is not bool
            if is_other or not isinstance(value, KINDS[shape]):
                raise ValueError(f"{where} is {value!r}" if value is None else f"{where} is of the wrong kind")


def _conform_keys(value: dict[str, Any], shape: dict[str, Any], where: str) -> None:
    for name, inner in shape.items():
        key = name.removesuffix(OPTIONAL)
        if name == ANY_KEY:
            for other, content in value.items():
                conform(content, inner, f"{where}.{other}")
        elif key in value:
            conform(value[key], inner, f"{where}.{key}")
        elif key == name:
            raise ValueError(f"{where}.{key} is missing")
