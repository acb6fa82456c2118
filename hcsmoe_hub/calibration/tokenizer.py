"""Loads the tokenizer of a checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hcsmoe_hub.calibration.library_failures import LibraryFailures
from hcsmoe_hub.errors import HcsmoeError

# Vocabularies of 256,000 tokens have a third of it.
MAX_BYTES = 100_000_000
_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm")


def load_tokenizer(folder: Path, explain: Callable[[BaseException], HcsmoeError]) -> Any:
    """The tokenizer of transformers in a folder; code inside the folder is never run.

    Args:
        folder: Folder with the tokenizer files.
        explain: Makes the failure to raise when the tokenizer cannot be loaded, in whatever way.
    """
    from transformers import AutoTokenizer

    _check_sizes(folder, explain)
    with LibraryFailures(explain):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _check_sizes(folder: Path, explain: Callable[[BaseException], HcsmoeError]) -> None:
    """Refuses files that no tokenizer needs: libraries read them whole, and take many times their size."""
    for path in sorted(folder.iterdir()):
        is_read = path.suffix in _SUFFIXES and not path.name.endswith(".index.json") and path.is_file()
        if is_read and (size := path.stat().st_size) > MAX_BYTES:
            raise explain(ValueError(f"{path.name} has {size} bytes, more than {MAX_BYTES}."))


def repair_hint(error: BaseException) -> str:
    """What to do about a tokenizer that cannot be loaded."""
    if "pip install" in str(error):
        return "install the library that is named"
    # The tokenizers library says so of a part of the file that it does not know, which newer versions of it may.
    if "untagged enum" in str(error):
        return "update the tokenizers library, or repair the tokenizer files"
    return "repair the tokenizer files"


def encode_text(
    tokenizer: Any, text: str, explain: Callable[[BaseException], HcsmoeError], **settings: Any
) -> list[int]:
    """Token ids of a text.

    Args:
        tokenizer: The tokenizer of transformers.
        text: The text, of any length: it is cut later, so the tokenizer does not warn about its length.
        explain: Makes the failure to raise when the tokenizer fails.
        settings: Passed to the tokenizer.
    """
    with LibraryFailures(explain):
        ids: list[int] = tokenizer(text, verbose=False, **settings)["input_ids"]
        return ids
