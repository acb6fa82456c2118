"""The small files that travel with the weights: tokenizer, chat template, generation defaults, licence."""

import shutil
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from hcsmoe_hub.checkpoint.source import Source

SIDECARS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates/*",
    "*processor_config.json",
    "LICEN[CS]E*",
    "NOTICE*",
    "COPYING*",
    "USE_POLICY*",
)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.*", "spiece.model", "*.tiktoken", "tekken.json")


def sidecar_files(files: Iterable[str]) -> list[str]:
    """The files that a result takes over byte for byte: programs load tokenizers by their own spelling."""
    return [file for file in files if any(fnmatch(file, pattern) for pattern in SIDECARS)]


def has_tokenizer(files: Iterable[str]) -> bool:
    """Whether a checkpoint brings a tokenizer."""
    return any(fnmatch(file, pattern) for file in files for pattern in TOKENIZER_FILES)


def copy_sidecars(source: Source, files: Iterable[str], folder: Path) -> None:
    """Copies sidecar files into the result."""
    for file in files:
        target = folder / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.fetch(file), target)
