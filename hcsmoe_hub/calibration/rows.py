"""Reads the rows of a source of text: the bundled text, files, folders, and datasets of the Hub."""

import glob
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from importlib.resources import files as package_files
from itertools import islice
from pathlib import Path
from typing import Any

from hcsmoe_hub.calibration.bounded_files import address, check_before, invalid_line, register
from hcsmoe_hub.calibration.documents import Row
from hcsmoe_hub.calibration.file_types import file_type, text_files
from hcsmoe_hub.calibration.library_failures import LibraryFailures, reason_of
from hcsmoe_hub.calibration.sources import BUNDLED, C4, SAVED_DATASETS, TextSource
from hcsmoe_hub.errors import CalibrationError

# The papers' protocol: the first shard of C4's English part, shuffled, cut into 32 blocks of 2048 tokens.
C4_FILES = {"path": "allenai/c4", "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}, "split": "train"}
SHUFFLE_BUFFER = 10_000
DEFAULT_SPLIT = "train"
# Rows that are held to be shuffled are fewer where they are long.
BUFFER_BYTES = 256_000_000
_SMALL_BYTES = 4_000_000


def read_rows(source: TextSource, *, seed: int, number: str | None = None) -> Iterator[Row]:
    """The rows of a source in shuffled order.

    Args:
        source: Where the text comes from.
        seed: Seed of the shuffle.
        number: Key under which each row of a file holds its place in it, from 0; ``None`` for none.

    Raises:
        CalibrationError: If the source cannot be read, or has no such config or split.
    """
    with LibraryFailures(partial(_explain, source)):
        rows = _open(source)
        for name, feature in (rows.features or {}).items():
            undecoded = _undecoded(feature)
            rows = rows if undecoded == feature else rows.cast_column(name, undecoded)
        if number is not None and source.is_file:
            rows = rows.map(lambda row, place: {**row, number: place}, with_indices=True)
        yield from rows.shuffle(seed=seed, buffer_size=_buffer(rows) if _is_large(source) else SHUFFLE_BUFFER)


def _is_large(source: TextSource) -> bool:
    """Whether a source is of files of this machine that may not fit into memory."""
    path = source.path
    files = [path] if path.is_file() else path.rglob("*") if path.is_dir() else ()
    return _is_here(source) and sum(f.stat().st_size for f in files if f.is_file()) > _SMALL_BYTES


def _buffer(rows: Any) -> int:
    """Number of rows that are shuffled at once, from the lengths of the first ones."""
    held = 0
    for count, row in enumerate(islice(rows, SHUFFLE_BUFFER)):
        held += sum(len(value) if isinstance(value, str | bytes) else len(repr(value)) for value in row.values())
        if held > BUFFER_BYTES:
            return max(1, count)
    return SHUFFLE_BUFFER


def _explain(source: TextSource, error: BaseException) -> CalibrationError:
    from datasets import config

    path = source.path
    invalid = invalid_line([path] if path.is_file() else list(text_files(path))) if _is_here(source) else None
    if invalid is not None:
        return invalid
    # The JSON reader of datasets raises this for an empty file.
    if isinstance(error, StopIteration):
        return CalibrationError(f"{source.text} is empty.", hint="pass a file that holds text")
    cache = Path(config.HF_DATASETS_CACHE).expanduser()
    place = getattr(error, "filename", None)
    if isinstance(error, OSError) and place is not None and _is_in(Path(str(place)), cache):
        return CalibrationError(
            f"{source.text} cannot be read: the cache of datasets in {cache} cannot be used ({error.strerror}).",
            hint="set HF_HOME or HF_DATASETS_CACHE to a folder that can be written to",
        )
    return CalibrationError(
        f"{source.text} cannot be read: {reason_of(error)}",
        hint=f"check the file, or the name of the dataset; `dataset='{BUNDLED}'` works offline",
    )


def _is_here(source: TextSource) -> bool:
    return source.location not in (BUNDLED, C4) and source.path.exists()


def _undecoded(feature: Any) -> Any:
    """A feature whose pictures and recordings are not decoded: nothing is calibrated on them."""
    import datasets

    if isinstance(feature, dict):
        return {name: _undecoded(inner) for name, inner in feature.items()}
    if isinstance(feature, datasets.Audio | datasets.Image | datasets.Pdf | datasets.Video):
        return replace(feature, decode=False)
    if isinstance(feature, datasets.List | datasets.LargeList):
        return replace(feature, feature=_undecoded(feature.feature))
    return feature


def _is_in(path: Path, folder: Path) -> bool:
    return path.is_relative_to(folder) or folder.is_relative_to(path)


def _open(source: TextSource) -> Any:
    """The rows of a source, in their own order, as an iterable dataset."""
    import datasets

    register()
    if source.location == BUNDLED:
        # The text is part of the package: it needs no cache on this machine.
        lines = (package_files(__package__) / "data" / "bundled.jsonl").read_bytes().splitlines()
        return datasets.Dataset.from_list([json.loads(line) for line in lines]).to_iterable_dataset()
    if source.location == C4:
        return datasets.load_dataset(**C4_FILES, streaming=True)
    path = source.path
    if path.is_file():
        return _read_files([path])
    if any((path / name).is_file() for name in SAVED_DATASETS):
        return _pick_split(source, _read_saved(path), _only_part(source))
    if path.is_dir():
        for file in text_files(path):
            check_before(file)
    config, split = _parts(source)
    try:
        splits = datasets.load_dataset(_address(source), name=config, streaming=True)
    except datasets.exceptions.DataFilesNotFoundError:
        # Endings in capitals, for example.
        if source.parts or not path.is_dir():
            raise
        return _read_files(list(text_files(path)))
    except ValueError:
        _check_config(source, config)
        raise
    return _pick_split(source, splits, split)


def _read_files(paths: list[Path]) -> Any:
    """Files of one type; of several types, those of the most frequent one, as datasets chooses."""
    import datasets

    kinds = [file_type(path) for path in paths]
    kind = max(kinds, key=kinds.count)
    assert kind is not None, "the plan refuses files of unknown types"
    paths = [path for path, found in zip(paths, kinds, strict=True) if found == kind]
    same = []
    for path in paths:
        checked = address(path, kind.reader)
        if checked is None:
            check_before(path)
        same.append(checked or glob.escape(str(path)))
    return datasets.load_dataset(
        kind.reader, data_files=same if len(same) > 1 else same[0], split="train", streaming=True, **kind.settings
    )


def _read_saved(path: Path) -> Mapping[str, Any]:
    """What ``save_to_disk`` has written, by split."""
    import datasets

    saved = datasets.load_from_disk(str(path))
    if isinstance(saved, datasets.Dataset):
        return {str(saved.split or DEFAULT_SPLIT): saved.to_iterable_dataset()}
    return {str(split): rows.to_iterable_dataset() for split, rows in saved.items()}


def _address(source: TextSource) -> str:
    return str(source.path) if source.path.is_dir() else source.location


def _only_part(source: TextSource) -> str | None:
    """The split of a saved dataset, which has no configs."""
    return source.parts[-1] if source.parts else None


def _parts(source: TextSource) -> tuple[str | None, str | None]:
    """Config and split; a single word is a config if the dataset has one of that name, otherwise a split."""
    from datasets import get_dataset_config_names

    match source.parts:
        case ():
            return None, None
        case (word,):
            return (word, None) if word in get_dataset_config_names(_address(source)) else (None, word)
        case (config, split):
            return config or None, split
    raise AssertionError("the plan refuses more than two parts")


def _check_config(source: TextSource, config: str | None) -> None:
    """Explains why a dataset cannot be loaded, if that is the choice of its config.

    Raises:
        CalibrationError: If it has several configs and none is named, or none of the name.
    """
    from datasets import get_dataset_config_names

    names = get_dataset_config_names(_address(source))
    if config in names or (config is None and len(names) < 2):
        return
    missing = "and none is named" if config is None else f"but not {config!r}"
    raise CalibrationError(
        f"{source.location} has the configs {', '.join(names)}, {missing}.",
        hint=f"name one as in `dataset='{source.location}:{names[0]}'`",
    )


def _pick_split(source: TextSource, splits: Mapping[str, Any], split: str | None) -> Any:
    wanted = split or DEFAULT_SPLIT
    if wanted in splits:
        return splits[wanted]
    config = f":{source.parts[0]}" if source.parts and source.parts[0] not in ("", split) else ""
    raise CalibrationError(
        f"{source.location}{config} has no split {wanted!r}; its splits are {', '.join(splits)}.",
        hint=f"name one as in `dataset='{source.location}{config}:{next(iter(splits))}'`",
    )
