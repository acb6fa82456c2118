"""Token ids in a file of numpy, and the fingerprint of token ids."""

import hashlib
import tokenize
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from hcsmoe_hub.errors import CalibrationError

# File type of token ids, which are used unchanged.
TOKEN_IDS = ".npy"


def holds_token_ids(name: str) -> bool:
    """Whether a calibration set is a file of token ids, by its name."""
    return name.lower().endswith(TOKEN_IDS)


def open_token_ids(path: Path) -> np.ndarray[Any, Any]:
    """Maps a file of token ids into memory, ``[sequences, length]`` int64.

    Raises:
        CalibrationError: If it does not exist, or holds something else.
    """
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


def check_vocabulary(ids: Tensor, *, vocab_size: int, label: str, hint: str) -> None:
    """Checks that all ids are in the vocabulary.

    Args:
        ids: Token ids of any shape, int64.
        vocab_size: Ids must be below this.
        label: Where the ids come from, in messages.
        hint: What to do if they are not.

    Raises:
        CalibrationError: If an id is outside it.
    """
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or highest >= vocab_size:
        raise CalibrationError(
            f"{label} holds token ids from {lowest} to {highest}, but the model's vocabulary of {vocab_size} tokens "
            f"ends at {vocab_size - 1}.",
            hint=hint,
        )


def fingerprint(ids: Tensor) -> str:
    """SHA-256 of the token ids as little-endian int64, row by row."""
    return hashlib.sha256(ids.contiguous().numpy().astype("<i8").tobytes()).hexdigest()
