"""Calibration text to token ids: packed sequences of equal length, without padding.

Padding tokens would count in every expert's statistics, so documents are joined and cut instead.
"""

import glob
import hashlib
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hcsmoe_hub.errors import CalibrationError, PlanError
from hcsmoe_hub.options import DEFAULT_SEQUENCE_LENGTH, CalibrationOptions, default_samples

BUNDLED = "bundled"
C4 = "c4"
# The papers' protocol: the first shard of C4's English part, shuffled, cut into 32 blocks of 2048 tokens.
C4_FILES = {"path": "allenai/c4", "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}, "split": "train"}
SHUFFLE_BUFFER = 10_000
FORMATS: Mapping[str, str] = {
    ".jsonl": "json",
    ".json": "json",
    ".gz": "json",
    ".txt": "text",
    ".parquet": "parquet",
    ".csv": "csv",
}
# File type of token ids, which are used unchanged.
TOKEN_IDS = ".npy"
TEXT_COLUMNS = ("messages", "text", "content")


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationPlan:
    """Calibration text, and how it is cut into sequences.

    Attributes:
        dataset: As the user named it.
        sequences: Maximum number of sequences.
        sequence_length: Tokens per sequence.
        seed: Seed of the document shuffle.
        text_column: Column with the text, ``None`` to find it.
        is_token_ids: Whether the file holds token ids, which are used unchanged.
    """

    dataset: str
    sequences: int
    sequence_length: int
    seed: int
    text_column: str | None
    is_token_ids: bool

    @property
    def tokens(self) -> int:
        """Maximum number of tokens."""
        return self.sequences * self.sequence_length


def plan_calibration(
    options: CalibrationOptions, *, max_positions: int | None, has_tokenizer: bool, label: str, fits: bool
) -> CalibrationPlan:
    """Checks the calibration options against the model, without reading text.

    Args:
        options: The calibration options.
        max_positions: Maximum sequence length of the model, ``None`` if its config does not state one.
        has_tokenizer: Whether the model has a tokenizer.
        label: Name of the model in messages.
        fits: Whether a refit will be fitted to the text.

    Raises:
        PlanError: If a tokenizer is missing or the sequences are longer than the model accepts.
        CalibrationError: If a file does not exist or its type is unknown.
    """
    path = Path(options.dataset).expanduser()
    if path.suffix == TOKEN_IDS:
        sequences, length = _open_token_ids(path).shape
    else:
        _check_dataset(options.dataset, path)
        if not has_tokenizer:
            raise PlanError(
                f"{label} has no tokenizer, so calibration text cannot be turned into tokens.",
                hint="add the tokenizer files, or pass token ids with `dataset='IDS.npy'`",
            )
        length = options.sequence_length or min(DEFAULT_SEQUENCE_LENGTH, max_positions or DEFAULT_SEQUENCE_LENGTH)
        sequences = options.samples or default_samples(length, fits=fits)
    if max_positions is not None and length > max_positions:
        raise PlanError(
            f"sequences of {length} tokens are longer than the {max_positions} positions of {label}.",
            hint=f"cut them to {max_positions} ids or fewer"
            if path.suffix == TOKEN_IDS
            else f"use `sequence_length={max_positions}` or less",
        )
    return CalibrationPlan(
        dataset=options.dataset,
        sequences=sequences,
        sequence_length=length,
        seed=options.seed,
        text_column=options.text_column,
        is_token_ids=path.suffix == TOKEN_IDS,
    )


def _check_dataset(dataset: str, path: Path) -> None:
    if dataset in (BUNDLED, C4) or (path.is_file() and path.suffix in FORMATS):
        return
    if path.is_file():
        raise CalibrationError(
            f"{dataset} has an unknown file type.",
            hint=f"pass a file that ends in {', '.join(FORMATS)}, or .npy for token ids",
        )
    if path.suffix in FORMATS or dataset.count("/") != 1 or dataset.startswith((".", "~", "/")):
        raise CalibrationError(
            f"there is no calibration file {dataset}.",
            hint=f"pass {BUNDLED}, {C4}, a file, or a Hub dataset written as org/name",
        )


def _open_token_ids(path: Path) -> np.ndarray[Any, Any]:
    hint = "save it with numpy.save as an int64 array of shape [sequences, length]"
    if not path.is_file():
        raise CalibrationError(f"there is no calibration file {path}.", hint="check the path")
    try:
        ids = np.load(path, allow_pickle=False, mmap_mode="r")
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, tokenize.TokenError) as error:
        raise CalibrationError(f"{path} is not an array of numbers: {error}.", hint=hint) from None
    if not isinstance(ids, np.ndarray):
        raise CalibrationError(f"{path} is an archive of arrays.", hint=hint)
    if ids.ndim != 2 or ids.dtype != np.int64 or 0 in ids.shape:
        raise CalibrationError(f"{path} holds {ids.dtype} values of shape {list(ids.shape)}.", hint=hint)
    return ids


def load_token_ids(plan: CalibrationPlan, *, tokenizer_folder: Path, vocab_size: int) -> Tensor:
    """Loads the calibration tokens.

    Args:
        plan: What to load.
        tokenizer_folder: Folder with the source's tokenizer files.
        vocab_size: Ids must be below this.

    Returns:
        ``[sequences, sequence_length]`` int64, with fewer sequences than planned if the text is short.

    Raises:
        CalibrationError: If the text is too short for one sequence, or an id is outside the vocabulary.
    """
    if plan.is_token_ids:
        ids = torch.from_numpy(np.array(_open_token_ids(Path(plan.dataset).expanduser())))
    else:
        ids = _pack(plan, tokenizer_folder)
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise CalibrationError(
            f"{plan.dataset} holds token ids from {ids.min()} to {ids.max()}, "
            f"but the vocabulary ends at {vocab_size - 1}.",
            hint="use ids from this model's own tokenizer",
        )
    return ids


def _pack(plan: CalibrationPlan, tokenizer_folder: Path) -> Tensor:
    """Tokenises documents, joins them, and cuts the result into sequences."""
    from jinja2 import TemplateError
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CalibrationError(
            f"the model's tokenizer cannot be loaded: {(str(error).splitlines() or [type(error).__name__])[0]}",
            hint="repair the tokenizer files, or pass token ids with `dataset='IDS.npy'`",
        ) from error
    # C4 follows the papers, which join documents without a separator.
    separator = [] if plan.dataset == C4 or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stream: list[int] = []
    for content in _documents(plan):
        if isinstance(content, str):
            # A document may exceed the model's context; it is cut below, so the tokenizer need not warn.
            stream += tokenizer(content, verbose=False)["input_ids"] + separator
        elif tokenizer.chat_template is None:
            raise CalibrationError(
                f"{plan.dataset} holds chat messages, but the model's tokenizer has no chat template.",
                hint="pass plain text, or name a text column with `text_column`",
            )
        else:
            try:
                ids: Any = tokenizer.apply_chat_template(content, tokenize=True, return_dict=False)
            except (TemplateError, TypeError, KeyError, AttributeError) as error:
                raise CalibrationError(
                    f"{plan.dataset} holds messages that the model's chat template rejects: {error}",
                    hint="pass plain text, or name a text column with `text_column`",
                ) from error
            stream += ids
        if len(stream) >= plan.tokens:
            break
    sequences = min(len(stream) // plan.sequence_length, plan.sequences)
    if sequences == 0:
        raise CalibrationError(
            f"{plan.dataset} gives {len(stream)} tokens, fewer than one sequence of {plan.sequence_length}.",
            hint="pass more text, or a smaller `sequence_length`",
        )
    return torch.tensor(stream[: sequences * plan.sequence_length]).view(sequences, plan.sequence_length)


def _documents(plan: CalibrationPlan) -> Iterator[Any]:
    """Documents in shuffled order: strings, or lists of chat messages."""
    for row in _rows(plan):
        names = TEXT_COLUMNS if plan.text_column is None else (plan.text_column,)
        present = [name for name in names if name in row]
        if not present and plan.text_column is None:
            raise CalibrationError(
                f"{plan.dataset} has no text: its columns are {', '.join(row)}.",
                hint="name the column that holds the text with `text_column`",
            )
        if not present:
            raise CalibrationError(
                f"{plan.dataset} has no column {plan.text_column!r}: its columns are {', '.join(row)}.",
                hint="name one of them with `text_column`",
            )
        # Rows may be blank, and different rows may use different columns.
        column = next((name for name in present if row[name]), None)
        if column is None:
            continue
        if not (isinstance(row[column], str) or _are_messages(row[column])):
            raise CalibrationError(
                f"column {column!r} of {plan.dataset} holds neither text nor chat messages.",
                hint="name the column that holds the text with `text_column`",
            )
        yield row[column]


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(message, dict) for message in value)


def _rows(plan: CalibrationPlan) -> Iterator[Mapping[str, Any]]:
    import datasets

    path = Path(plan.dataset).expanduser()
    if plan.dataset == C4:
        arguments: dict[str, Any] = dict(C4_FILES)
    elif plan.dataset == BUNDLED:
        arguments = {"path": "json", "data_files": str(package_files(__package__) / "data" / "bundled.jsonl")}
    elif path.is_file():
        arguments = {"path": FORMATS[path.suffix], "data_files": glob.escape(str(path))}
        if path.suffix == ".txt":
            arguments["sample_by"] = "paragraph"
    else:
        arguments = {"path": plan.dataset}
    try:
        rows = datasets.load_dataset(**{"split": "train", **arguments}, streaming=True)
        yield from rows.shuffle(seed=plan.seed, buffer_size=SHUFFLE_BUFFER)
    except StopIteration:
        # The JSON reader of datasets raises this for an empty file.
        raise CalibrationError(f"{plan.dataset} is empty.", hint="pass a file that holds text") from None
    except (datasets.exceptions.DatasetsError, OSError, ValueError, EOFError, zlib.error) as error:
        raise CalibrationError(
            f"{plan.dataset} cannot be read: {(str(error).splitlines() or [type(error).__name__])[0]}",
            hint=f"check the file, or the name of the dataset; `dataset='{BUNDLED}'` works offline",
        ) from error


def fingerprint(ids: Tensor) -> str:
    """SHA-256 of the token ids as little-endian int64, row by row."""
    return hashlib.sha256(ids.contiguous().numpy().astype("<i8").tobytes()).hexdigest()


def dataset_file(dataset: str) -> Path | None:
    """Path of a calibration set that is a file; ``None`` for the bundled text, C4 and Hub datasets."""
    path = Path(dataset).expanduser()
    return path if path.suffix in (*FORMATS, TOKEN_IDS) else None


def dataset_name(dataset: str) -> str:
    """Name of a calibration set for files that may be published: a file without its folders."""
    path = dataset_file(dataset)
    return dataset if path is None else path.name


def dataset_digest(dataset: str) -> str | None:
    """SHA-256 of a calibration file; ``None`` if the set is not a file, or the file no longer exists."""
    path = dataset_file(dataset)
    if path is None or not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
