"""Types of text files that ``datasets`` reads, by the endings of their names in any case."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hcsmoe_hub.calibration.token_ids import TOKEN_IDS


@dataclass(frozen=True, slots=True)
class FileType:
    """How ``datasets`` reads a type of file.

    Attributes:
        reader: Name of its reader.
        settings: Settings of the reader.
    """

    reader: str
    settings: Mapping[str, Any] = field(default_factory=dict)


_JSON, _PARQUET = FileType("json"), FileType("parquet")
FILE_TYPES: Mapping[str, FileType] = {
    ".jsonl": _JSON,
    ".json": _JSON,
    ".ndjson": _JSON,
    # A document is a paragraph, not a line.
    ".txt": FileType("text", {"sample_by": "paragraph"}),
    ".parquet": _PARQUET,
    ".csv": FileType("csv"),
    ".tsv": FileType("csv", {"sep": "\t"}),
    ".arrow": FileType("arrow"),
}
COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2", ".lz4", ".zip")
KNOWN_ENDINGS = f"{', '.join(FILE_TYPES)}, compressed or not"


def file_type(path: Path) -> FileType | None:
    """How a file is read, by its name; ``None`` if its type is unknown."""
    endings = [ending.lower() for ending in path.suffixes]
    if endings and endings[-1] in FILE_TYPES:
        return FILE_TYPES[endings[-1]]
    if endings and endings[-1] in COMPRESSIONS:
        inner = endings[-2] if len(endings) > 1 else ""
        # JSON lines are often compressed without an ending of their own.
        is_plain = endings[-1] == ".gz" and inner != ".tar"
        return FILE_TYPES.get(inner, _JSON if is_plain else None)
    return None


def looks_like_file(name: str) -> bool:
    """Whether a name has an ending that only files have."""
    return Path(name).suffix.lower() == TOKEN_IDS or file_type(Path(name)) is not None


def text_files(folder: Path) -> Iterator[Path]:
    """Text files in a folder and its subfolders, in the order of their names; hidden ones are left out."""
    for path in sorted(folder.rglob("*")):
        is_hidden = any(part.startswith((".", "__")) for part in path.relative_to(folder).parts)
        if not is_hidden and file_type(path) is not None and path.is_file():
            yield path
