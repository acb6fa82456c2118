"""Reads what ``--calibration`` names: one source of text, or several with shares."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

from hcsmoe_hub.calibration.file_types import KNOWN_ENDINGS, file_type, looks_like_file, text_files
from hcsmoe_hub.calibration.token_ids import holds_token_ids
from hcsmoe_hub.errors import CalibrationError

BUNDLED = "bundled"
C4 = "c4"
# Text that the source model writes itself.
SELF = "self"
_NAMED = (BUNDLED, C4, SELF)
_SERVER = ("http://", "https://")
# Files that ``datasets`` writes into a folder with ``save_to_disk``.
SAVED_DATASETS = ("state.json", "dataset_dict.json")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Old datasets of the Hub have no namespace.
_HUB_ID_WITH_PARTS = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_ADDRESS = re.compile(r"(?:https?://huggingface\.co|hf:/)/datasets/([\w.-]+(?:/[\w.-]+)?)")
_WHAT = f"pass {BUNDLED}, {C4}, {SELF}, a file, a folder, the address of a server, or a Hub dataset written as org/name"


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSource:
    """One source of calibration text.

    Attributes:
        text: As the user named it, without its share.
        location: ``bundled``, ``c4``, ``self``, a path, the address of a server, or the id of a Hub dataset.
        parts: What follows the location after colons: config and split, or one of them.
        weight: The share as the user gave it; ``None`` if none was given.
        share: Share of all sequences, above 0 and at most 1.
        domain: What measures call this text: its name, unique among the sources.
    """

    text: str
    location: str
    parts: tuple[str, ...] = ()
    weight: float | None = None
    share: float = 1.0
    domain: str = ""

    @property
    def path(self) -> Path:
        """The location as a path."""
        return _path(self.location)

    @property
    def is_file(self) -> bool:
        """Whether it is a file, which may no longer exist."""
        is_elsewhere = self.location in _NAMED or self.is_server
        return not is_elsewhere and (looks_like_file(self.location) or _is_file(self.location))

    @property
    def is_server(self) -> bool:
        """Whether it is a server that text is sampled from."""
        return self.location.startswith(_SERVER)

    @property
    def is_token_ids(self) -> bool:
        """Whether it holds token ids, which are used unchanged."""
        return holds_token_ids(self.location)

    @property
    def name(self) -> str:
        """Its name for what may be published: no folders that files lie in, and no addresses of servers."""
        if self.is_server:
            return "server"
        is_path = self.is_file or self.location.startswith((".", "~", "/")) or _is_folder(self.location)
        named = os.path.basename(os.path.abspath(self.path)) if is_path else self.location
        return ":".join((named, *self.parts))


def parse_sources(dataset: str) -> tuple[TextSource, ...]:
    """Reads ``bundled``, ``a.jsonl``, ``org/name:config:split`` or ``a.jsonl=0.5,b.jsonl=0.3,c4=0.2``.

    Shares are relative: they are divided by their sum. Without shares, all sources count the same. A name that exists
    as a file or a folder is taken as it is, whatever characters it has.

    Raises:
        CalibrationError: If a share is not a number above 0, or only some sources have one.
    """
    if dataset.strip() and _exists(dataset):
        return _finished([_source(dataset)])
    items = [item.strip() for item in dataset.split(",")]
    if not all(items):
        raise CalibrationError(
            f"'{dataset}' lacks the name of a text.", hint=f"{_WHAT}, or several as `dataset='a.jsonl=0.5,c4=0.5'`"
        )
    sources = [_weighted(item) for item in items]
    if len({source.weight is None for source in sources}) > 1:
        missing = next(source.text for source in sources if source.weight is None)
        raise CalibrationError(
            f"'{dataset}' gives some sources a share, but not {missing}.", hint="give every source a share, or none"
        )
    twice = [text for text, count in Counter(source.text for source in sources).items() if count > 1]
    if twice:
        raise CalibrationError(f"'{dataset}' names {twice[0]} twice.", hint="name it once, with the sum of its shares")
    return _finished(sources)


def _finished(sources: Sequence[TextSource]) -> tuple[TextSource, ...]:
    """Adds shares that sum to 1, and domains."""
    weights = [1.0 if source.weight is None else source.weight for source in sources]
    total, seen = sum(weights), Counter[str]()
    finished = []
    for source, weight in zip(sources, weights, strict=True):
        seen[source.name] += 1
        number = seen[source.name]
        domain = source.name if number == 1 else f"{source.name} ({number})"
        finished.append(replace(source, share=weight / total, domain=domain))
    return tuple(finished)


def _path(name: str) -> Path:
    # Unlike the method of Path, this takes a user that does not exist.
    return Path(os.path.expanduser(name))


def _exists(name: str) -> bool:
    # Unlike the methods of Path, these take names that are too long or hold a zero byte.
    return os.path.exists(_path(name))


def _is_file(name: str) -> bool:
    return os.path.isfile(_path(name))


def _is_folder(name: str) -> bool:
    return os.path.isdir(_path(name))


def _weighted(item: str) -> TextSource:
    name, sign, share = item.rpartition("=")
    if not sign or _exists(item):
        return _source(item)
    try:
        weight = float(share)
    except ValueError:
        weight = 0.0
    if not (isfinite(weight) and weight > 0 and name):
        raise CalibrationError(
            f"the share in '{item}' is not a number above 0.", hint="write it as in `dataset='a.jsonl=0.5,c4=0.5'`"
        )
    return replace(_source(name.strip()), weight=weight)


def _source(text: str) -> TextSource:
    if text in _NAMED or _exists(text) or text.startswith(_SERVER) or looks_like_file(text):
        return TextSource(text=text, location=text)
    location, *parts = text.split(":")
    return TextSource(text=text, location=location, parts=tuple(parts))


def check_source(source: TextSource) -> None:
    """Checks that a source can exist, without network access.

    Raises:
        CalibrationError: If a file or a folder is missing or of an unknown type, or a name cannot be that of a dataset.
    """
    path = source.path
    if source.parts and (source.location in _NAMED or _is_file(source.location)):
        raise CalibrationError(
            f"{source.location} has neither configs nor splits, so '{source.text}' names nothing.",
            hint=f"write {source.location} alone",
        )
    address = _HUB_ADDRESS.match(source.text)
    if source.location in _NAMED or (source.is_server and address is None):
        return
    if len(source.parts) > 2 or (source.parts and not source.parts[-1]):
        raise CalibrationError(f"'{source.text}' is not ID[:CONFIG][:SPLIT].", hint="write it as org/name:config:split")
    if _is_file(source.location):
        if file_type(path) is None:
            raise CalibrationError(
                f"{source.location} has an unknown file type.",
                hint=f"pass a file that ends in {KNOWN_ENDINGS}, or .npy for token ids",
            )
    elif _is_folder(source.location):
        if not any((path / name).is_file() for name in SAVED_DATASETS) and not any(text_files(path)):
            raise CalibrationError(
                f"the folder {source.location} holds no text files.", hint=f"pass files that end in {KNOWN_ENDINGS}"
            )
    elif address is not None:
        raise CalibrationError(
            f"{source.text} is an address; datasets of the Hub are named by their ids.",
            hint=f"use `dataset='{address[1]}'`",
        )
    elif looks_like_file(source.location) or not _is_hub_id(source):
        raise CalibrationError(f"there is no calibration file {source.text}.", hint=_WHAT)


def _is_hub_id(source: TextSource) -> bool:
    pattern = _HUB_ID_WITH_PARTS if source.parts else _HUB_ID
    return pattern.fullmatch(source.location) is not None and not source.location.startswith(".")


def dataset_name(dataset: str) -> str:
    """Name of a calibration set for files that may be published: files and folders without their folders."""
    sources = parse_sources(dataset)
    shares = ["" if source.weight is None else f"={source.weight:g}" for source in sources]
    return ",".join(f"{source.name}{share}" for source, share in zip(sources, shares, strict=True))


def source_digest(source: TextSource) -> str | None:
    """SHA-256 of a file; ``None`` if the source is not a file, or the file no longer exists."""
    if not source.is_file or not _is_file(source.location):
        return None
    with source.path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def dataset_digest(dataset: str) -> str | None:
    """SHA-256 of a calibration set that is one file; ``None`` for anything else."""
    sources = parse_sources(dataset)
    return source_digest(sources[0]) if len(sources) == 1 else None


def is_same_dataset(asked: str, recorded: Mapping[str, Any]) -> bool:
    """Whether a calibration set is the one of a record: by the content of its files, otherwise by its name.

    Args:
        asked: The calibration set, as in the options.
        recorded: What a report or a statistics file recorded of a calibration set.
    """
    digest = dataset_digest(asked)
    if digest is not None and recorded["dataset_sha256"] is not None:
        return bool(digest == recorded["dataset_sha256"])
    digests = [source["sha256"] for source in recorded.get("sources", ())]
    found = [source_digest(source) for source in parse_sources(asked)] if digests else []
    return bool(dataset_name(asked) == recorded["dataset"] and digests == found)
