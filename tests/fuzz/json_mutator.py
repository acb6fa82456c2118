"""Changes JSON as JSON: a fuzzer that only flips bytes hardly gets past the parser."""

import json
import random
from typing import Any

# What readers may trip over: counts beyond 64 bits, numbers that are not whole, text in the place of numbers.
VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    8,
    2**31,
    2**63,
    2**64,
    2**70,
    10**400,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    "",
    " ",
    "8",
    "..",
    "../a",
    "C:\\a",
    "a\0b",
    "\ud800",
    "model.safetensors",
    [],
    {},
    [[]],
    [1, 2],
    {"a": 1},
)


def mutate(value: Any, chance: random.Random, words: list[str]) -> Any:
    """A copy of a JSON value with one node changed, removed, added, or put in another place.

    Args:
        value: The value.
        chance: Source of randomness.
        words: Keys that objects may get.
    """
    if isinstance(value, dict) and value and chance.random() < 0.85:
        key = chance.choice(list(value))
        match chance.randrange(8):
            case 0:
                return {name: inner for name, inner in value.items() if name != key}
            case 1:
                return {**value, chance.choice(words): chance.choice([*VALUES, *value.values()])}
            case _:
                return {**value, key: mutate(value[key], chance, words)}
    if isinstance(value, list) and value and chance.random() < 0.85:
        place = chance.randrange(len(value))
        match chance.randrange(6):
            case 0:
                return [*value[:place], *value[place + 1 :]]
            case 1:
                return [*value, value[place]]
            case _:
                return [*value[:place], mutate(value[place], chance, words), *value[place + 1 :]]
    if isinstance(value, int) and not isinstance(value, bool) and chance.random() < 0.5:
        return value + chance.choice([-1, 1, 2, 1000, -value])
    return chance.choice(VALUES)


def mutate_json(data: bytes, seed: int, words: list[str]) -> bytes | None:
    """The bytes of a changed value; ``None`` if ``data`` is not JSON, or what comes out cannot be written."""
    try:
        value = json.loads(data)
        chance = random.Random(seed)
        for _ in range(chance.choice([1, 1, 1, 2, 4])):
            value = mutate(value, chance, words)
        return json.dumps(value).encode()
    except (ValueError, RecursionError):
        return None
