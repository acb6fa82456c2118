"""The small files that accompany the weights: tokenizer, chat template, generation defaults, licence."""

from collections.abc import Iterable
from fnmatch import fnmatch

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
    # Code that "auto_map" in config.json names; it is copied, never run.
    "configuration_*.py",
    "modeling_*.py",
    "tokenization_*.py",
    "*LICEN[CS]E*",
    "*licen[cs]e*",
    "NOTICE*",
    "COPYING*",
    "USE_POLICY*",
)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.*", "spiece.model", "*.tiktoken", "tekken.json")


def sidecar_files(files: Iterable[str]) -> list[str]:
    """The files that are copied into a result byte for byte, since programs load tokenizers as they were written."""
    return [file for file in files if any(_matches(file, pattern) for pattern in SIDECARS)]


def has_tokenizer(files: Iterable[str]) -> bool:
    """Whether a checkpoint has a tokenizer."""
    return any(_matches(file, pattern) for file in files for pattern in TOKENIZER_FILES)


def _matches(file: str, pattern: str) -> bool:
    # fnmatch lets * match a slash, but files in other folders are not sidecars.
    return file.count("/") == pattern.count("/") and fnmatch(file, pattern)
