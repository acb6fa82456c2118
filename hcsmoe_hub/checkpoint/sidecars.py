"""The files next to the weights: which a result needs, and why the others stay behind."""

import re
from collections.abc import Callable, Collection, Iterable
from fnmatch import fnmatch
from pathlib import Path

from hcsmoe_hub.checkpoint.shards import ADAPTERS, CONSOLIDATED, FOREIGN_WEIGHTS
from hcsmoe_hub.errors import SourceError

# A checkpoint with any of these has a tokenizer.
TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model*",
    "vocab.*",
    "spiece.model",
    "*sentencepiece*.model",
    "*.spm",
    "tiktoken.model",
    "*.tiktoken",
    "tekken.json",
)
# Licences and conditions of use, in any case.
LEGAL = (
    "*licen[cs]e*",
    "*notice*",
    "*copying*",
    "*copyright*",
    "*use[_-]policy*",
    "*usage[_-]policy*",
    "terms*",
    "patents*",
)
# Code that "auto_map" in config.json usually names; it is copied, never run.
CODE = ("configuration_*.py", "modeling_*.py", "tokenization_*.py", "*processing_*.py", "*processor.py")
OTHERS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "*.jinja",
    "chat_template*",
    "additional_chat_templates/*",
    "chat_templates/*",
    # DeepSeek's code in place of a chat template.
    "encoding/*",
    "custom_generate/*",
    "SYSTEM_PROMPT*",
    "*processor*.json",
)


def _in_any_case(pattern: str) -> str:
    """The pattern with both cases of every letter."""
    return re.sub(r"\[(.+?)\]|([a-z])", lambda part: f"[{part[1] or part[2]}{(part[1] or part[2]).upper()}]", pattern)


LEGAL_IN_ANY_CASE = tuple(map(_in_any_case, LEGAL))
# Patterns of all files that are copied for their name.
SIDECARS = (*TOKENIZERS, *OTHERS, *CODE, *LEGAL_IN_ANY_CASE)
# Configs that may name code in the folder itself.
NAMING_CODE = ("config.json", "tokenizer_config.json", "*processor*.json")
NAMED_CLASS = re.compile(r'"(\w+)\.\w+"')
RELATIVE_IMPORT = re.compile(r"^[ \t]*from[ \t]+(\.+)([\w.]*)[ \t]+import[ \t]+(\([^)]*\)|[^\n#]*)", re.MULTILINE)

TRAINING_STATE = (
    "checkpoint-*",
    "global_step*",
    "optimizer*",
    "scheduler*",
    "rng_state*",
    "scaler.pt",
    "trainer_state.json",
    "training_args.bin",
)
# Why a file stays behind; the first that fits.
REASONS = (
    (ADAPTERS, "an adapter; the weights are converted without it"),
    (TRAINING_STATE, "the state of a training run"),
    ((CONSOLIDATED, "params.json"), "weights of the source under Mistral's own names"),
    (("*.safetensors", "*.safetensors.index*.json"), "weights that the checkpoint does not load"),
    ((*FOREIGN_WEIGHTS, *(f"{kind}.index.json" for kind in FOREIGN_WEIGHTS)), "weights in a format that is not read"),
    (("*.py",), "code that the checkpoint does not name"),
    (LEGAL_IN_ANY_CASE, "a licence in a sub-folder, to be added by hand if it applies"),
    (("README.md",), "the card of the source; the result has a card of its own"),
)
OTHER_REASON = "not needed to load the model"


def is_sidecar(file: str) -> bool:
    """Whether a file is copied into a result for its name alone."""
    return any(_matches(file, pattern) for pattern in SIDECARS) and _is_utf8(file)


def is_legal(file: str) -> bool:
    """Whether a file is a licence or says how the model may be used."""
    return any(_matches(file, pattern) for pattern in LEGAL_IN_ANY_CASE)


def sidecar_files(files: Collection[str], read: Callable[[str], str]) -> list[str]:
    """The files that are copied into a result byte for byte, since programs load tokenizers as they were written.

    Besides those with a known name, they are the Python files that a config names or other copied code imports.

    Args:
        files: Names of all files.
        read: Returns the text of one; called only if there is Python code that is not copied for its name.

    Returns:
        Their names, sorted.
    """
    copied = {file for file in files if is_sidecar(file)}
    unexplained = {file for file in files if file.endswith(".py") and _is_utf8(file)} - copied
    unread = [file for file in copied if file.endswith(".py")]
    if any("/" not in file for file in unexplained):
        unread += [file for file in files if any(_matches(file, pattern) for pattern in NAMING_CODE)]
    while unexplained and unread:
        file = unread.pop()
        named = _named_code(file, read(file)) & unexplained
        copied |= named
        unexplained -= named
        unread.extend(named)
    return sorted(copied)


def _named_code(file: str, text: str) -> set[str]:
    """Python files that a config or a Python file may name; some of them need not exist."""
    if not file.endswith(".py"):
        return {f"{module}.py" for module in NAMED_CLASS.findall(text)}
    named = set[str]()
    folders = file.split("/")[:-1]
    for dots, module, names in RELATIVE_IMPORT.findall(text):
        above = len(dots) - 1
        parts = [*folders[: len(folders) - above], *filter(None, module.split("."))]
        if above <= len(folders):
            # What is imported from a module may be a module itself, and so is every folder on the way.
            modules = [parts, *([*parts, name] for name in re.findall(r"\w+", names))]
            modules += [parts[:depth] for depth in range(1, len(parts))]
            named |= {"/".join(module) + end for module in modules for end in (".py", "/__init__.py")}
    return named


def refuse_link_out(folder: Path, file: str) -> None:
    """Refuses a file that is a link to somewhere outside of its checkpoint, unless only weights are read from it.

    A folder that somebody else made could otherwise put any file of this machine into a result.

    Args:
        folder: The folder of the checkpoint.
        file: Name of a file in it.

    Raises:
        SourceError: If the file is such a link; the Hub's cache may link a snapshot to the files of its repository.
    """
    if file.endswith(".safetensors") and not is_sidecar(file):
        return
    target, inside = (folder / file).resolve(), folder.resolve()
    allowed = [inside]
    for snapshots in (path for path in inside.parents if path.name == "snapshots"):
        if snapshots.parent.name.startswith("models--"):
            allowed.append((snapshots.parent / "blobs").resolve())
    if any(target.is_relative_to(place) for place in allowed):
        return
    raise SourceError(
        f"{folder / file} is a link to {target}, outside of the checkpoint, from where only shards are read.",
        hint="look at that file, and put a copy of it in place of the link if it belongs to the checkpoint",
    )


def has_tokenizer(files: Iterable[str]) -> bool:
    """Whether a checkpoint has a tokenizer."""
    return any(_matches(file, pattern) for file in files for pattern in TOKENIZERS)


def left_files(files: Iterable[str], used: Collection[str]) -> dict[str, str]:
    """Why each of the other files stays behind; a sub-folder counts as one, hidden files of other programs as none.

    Args:
        files: Names of all files.
        used: Those that are read or copied.

    Returns:
        Reasons by name; the name of a folder ends with a slash.
    """
    reasons: dict[str, list[str]] = {}
    for file in files:
        if file not in used and not any(part.startswith((".", "__pycache__")) for part in file.split("/")):
            folder, slash, _ = file.partition("/")
            reasons.setdefault(_printable(folder) + slash, []).append(_reason(file))
    order = [reason for _, reason in REASONS]
    return {
        name: min(found, key=lambda reason: order.index(reason) if reason in order else len(order))
        for name, found in sorted(reasons.items())
    }


def _reason(file: str) -> str:
    name = file.rpartition("/")[2]
    if not _is_utf8(file):
        return "its name is not UTF-8"
    # A folder may say as much as the file: LICENSES, checkpoint-500.
    names = {name, file.partition("/")[0]}
    found = (why for patterns, why in REASONS if any(fnmatch(one, pattern) for one in names for pattern in patterns))
    return next(found, OTHER_REASON)


def _matches(file: str, pattern: str) -> bool:
    # fnmatch lets * match a slash, but files in other folders are not sidecars.
    return file.count("/") == pattern.count("/") and fnmatch(file, pattern)


def _is_utf8(file: str) -> bool:
    return _printable(file) == file


def _printable(file: str) -> str:
    """A name with a backslash and digits for every byte that is not UTF-8."""
    return file.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
