"""Which files hold the weights of a checkpoint that has no index."""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from fnmatch import fnmatch
from itertools import islice

from hcsmoe_hub.errors import SourceError

# Weights in formats that are never opened: pickles can run code, the others are not safetensors.
FOREIGN_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.msgpack", "*.h5", "*.gguf", "*.onnx", "*.npz", "*.tflite")
# Mistral's own format, which is often stored next to that of transformers.
CONSOLIDATED = "consolidated*"
ADAPTERS = ("adapter_config.json", "adapter_model*")
NUMBERED = re.compile(r"(.+)-(\d+)-of-(\d+)\.safetensors")


def has_adapter(files: Collection[str]) -> bool:
    """Whether there is an adapter of PEFT, alone or next to the weights."""
    return "adapter_config.json" in files


def adapter_refusal(label: str) -> SourceError:
    """The refusal of a checkpoint that has no other weights than those of an adapter."""
    return SourceError(
        f"{label} holds an adapter, not a model.",
        hint="merge it into its base model first, with peft's merge_and_unload() and save_pretrained()",
    )


def foreign_weights(files: Iterable[str]) -> str:
    """Names of some weight files that cannot be read; empty if there are none."""
    return ", ".join(islice((file for file in files if any(fnmatch(file, kind) for kind in FOREIGN_WEIGHTS)), 3))


def top_safetensors(files: Iterable[str]) -> list[str]:
    """Safetensors files in the folder itself; hidden ones are not part of a checkpoint."""
    return [file for file in files if file.endswith(".safetensors") and "/" not in file and file[0] != "."]


def shards_without_index(files: Sequence[str], *, label: str, missing_hint: str, weights_hint: str) -> list[str]:
    """The shards of a checkpoint without an index.

    They are the files named as transformers names shards, or else those whose names begin with ``model``, or else all.

    Args:
        files: Names of all files.
        label: Name of the checkpoint in messages.
        missing_hint: What to do about a missing shard.
        weights_hint: What to do if there are no safetensors weights.

    Returns:
        Their names, sorted.

    Raises:
        SourceError: If there are none that can be read, or a number is missing.
    """
    found = top_safetensors(files)
    readable = [file for file in found if not any(fnmatch(file, kind) for kind in (CONSOLIDATED, *ADAPTERS))]
    if not readable:
        _refuse(files, found, label=label, weights_hint=weights_hint)
    usual = [file for file in readable if re.fullmatch(r"model-\d+-of-\d+\.safetensors", file)]
    shards = sorted(usual or [file for file in readable if file.startswith("model")] or readable)
    _check_numbers(shards, label=label, hint=missing_hint)
    return shards


def _refuse(files: Sequence[str], found: Sequence[str], *, label: str, weights_hint: str) -> None:
    """Says why there is nothing to read."""
    if any(fnmatch(file, CONSOLIDATED) for file in found):
        raise SourceError(
            f"{label} holds only {', '.join(found[:3])}: the tensors have Mistral's own names, which transformers "
            "cannot read.",
            hint="download the model's other safetensors files, or convert these with the script "
            "'convert_mistral_weights_to_hf.py' of transformers",
        )
    if found or has_adapter(files):
        raise adapter_refusal(label)
    elsewhere = [file for file in files if file.lower().endswith(".safetensors") and not file.startswith(".")]
    if elsewhere:
        raise SourceError(
            f"{label} holds no weights in the place of model.safetensors, only {', '.join(elsewhere[:3])}.",
            hint="put config.json and the safetensors files into one folder, and pass that",
        )
    foreign = foreign_weights(files)
    raise SourceError(
        f"{label} holds {f'only {foreign}' if foreign else 'no weights'}: hcsmoe reads safetensors and never opens a "
        "pickle.",
        hint=weights_hint,
    )


def _check_numbers(shards: Sequence[str], *, label: str, hint: str) -> None:
    """Checks that every series ``NAME-00001-of-00005.safetensors`` is complete.

    Raises:
        SourceError: If a number is missing.
    """
    series: defaultdict[tuple[str, str], dict[int, str]] = defaultdict(dict)
    for shard in shards:
        if match := NUMBERED.fullmatch(shard):
            name, number, total = match.groups()
            series[name, total][int(number)] = number
    for (name, total), numbers in series.items():
        first = 0 if 0 in numbers else 1
        wanted = range(first, first + int(total))
        lost = int(total) - sum(number in wanted for number in numbers)
        if lost:
            width = len(next(iter(numbers.values())))
            names = (f"{name}-{number:0{width}}-of-{total}.safetensors" for number in wanted if number not in numbers)
            raise SourceError(
                f"{label} lacks {lost} of {int(total)} shards, by the names of the others: "
                f"{', '.join(islice(names, 3))}.",
                hint=hint,
            )
