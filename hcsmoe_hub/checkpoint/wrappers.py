"""Prefixes that wrappers of a model leave in the names of its tensors when it is saved with them."""

import re
from collections.abc import Collection

from hcsmoe_hub.errors import SourceError

# torch.compile, DDP and DeepSpeed, Lightning Fabric, FSDP, PEFT: each wraps the whole model.
PREFIXES = ("_orig_mod.", "module.", "_forward_module.", "_fsdp_wrapped_module.", "base_model.model.")
# These also wrap single layers, and no model has modules of these names.
MARKS = re.compile(r"(?<![^.])(?:_orig_mod|_forward_module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Parts of names that PEFT adds for an adapter which has not been merged.
ADAPTER_PARTS = re.compile(r"(?<![^.])(?:lora_(?:A|B|E|embedding_A|embedding_B|magnitude_vector)|base_layer)\.")


def unwrap(names: Collection[str], *, label: str) -> tuple[str, dict[str, str]]:
    """Finds what a wrapper left in the names of stored tensors.

    Args:
        names: Every stored name.
        label: Name of the checkpoint in messages.

    Returns:
        What is left out, such as ``module._orig_mod.``, and the name without it by stored name.

    Raises:
        SourceError: If the tensors are those of an adapter.
    """
    adapter = next((name for name in names if ADAPTER_PARTS.search(name)), None)
    if adapter is not None:
        raise SourceError(
            f"{label} stores {adapter!r}, a part of a PEFT adapter that has not been merged into the weights.",
            hint="merge it first, with peft's merge_and_unload() and save_pretrained()",
        )
    if not names:
        # Every prefix would fit, without end.
        return "", {}
    prefix = ""
    while found := next((part for part in PREFIXES if all(name.startswith(prefix + part) for name in names)), ""):
        prefix += found
    plain = {name: MARKS.sub("", name.removeprefix(prefix)) for name in names}
    if len(set(plain.values())) < len(names):
        return "", {name: name for name in names}
    marks = {mark for name in names for mark in MARKS.findall(name.removeprefix(prefix))}
    return prefix + "".join(sorted(marks)), plain
