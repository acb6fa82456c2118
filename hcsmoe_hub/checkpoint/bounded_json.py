"""JSON of a checkpoint: somebody else's file, so its size and density are looked at before it is parsed.

What Python makes of JSON takes up to 25 times the bytes of the text: an empty list is three characters and 64 bytes.
Names, shapes and offsets of tensors are far from that, so a long text that is nearer is refused.
"""

import json
from pathlib import Path
from typing import Any

# A header or an index of a trillion parameters in 200,000 tensors is half of that.
MAX_BYTES = 48_000_000
# Shorter texts may be as dense as they like.
SHORT_BYTES = 4_000_000
# The least bytes per quotation mark and per bracket: an entry of a header has eight and three of them, in 70 or more.
BYTES_PER_QUOTE, BYTES_PER_BRACKET = 6, 12


def parse_bounded(text: bytes | str, *, most: int = MAX_BYTES) -> Any:
    """Parses JSON that needs memory in proportion to its size.

    Args:
        text: The JSON; bytes are UTF-8.
        most: Longest text that is parsed.

    Raises:
        ValueError: If it is too long, too dense, nested too deeply, ambiguous, or not JSON; says which.
    """
    if len(text) > most:
        raise ValueError(f"it has {len(text)} bytes, and no such file needs more than {most}")
    if len(text) > SHORT_BYTES and _is_dense(text):
        raise ValueError("it consists of more lists, objects and names than its length allows")
    try:
        # Of bytes, Python would also take UTF-16, which other programs do not.
        return json.loads(text if isinstance(text, str) else text.decode(), object_pairs_hook=_unambiguous)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; ``None`` if the file is missing or damaged, or holds something else."""
    try:
        found = parse_bounded(path.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, unless it gives a name two values: some programs take the first one, others the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next((name for name, value in pairs if found[name] != value), None)
        if twice is not None:
            raise ValueError(f"it gives {twice!r} two values")
    return found


def _is_dense(text: bytes | str) -> bool:
    quotes, *brackets = (
        (text.count(each) for each in (b'"', b"[", b"{"))
        if isinstance(text, bytes)
        else (text.count(each) for each in ('"', "[", "{"))
    )
    return quotes * BYTES_PER_QUOTE > len(text) or sum(brackets) * BYTES_PER_BRACKET > len(text)
