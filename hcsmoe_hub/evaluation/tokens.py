"""The tokenizer of a checkpoint, as evaluations use it."""

from collections.abc import Iterable
from typing import Any

from hcsmoe_hub.checkpoint.sidecars import has_tokenizer, sidecar_files
from hcsmoe_hub.checkpoint.source import Source
from hcsmoe_hub.errors import PlanError


class Tokens:
    """Text to token ids without special tokens, and the ids that begin and end a text.

    Args:
        source: The checkpoint.

    Attributes:
        first: Id that a text begins with: ``<bos>``, or ``<eos>`` where a tokenizer has none.
        last: Id that ends a text, ``None`` if there is none.
        tokenizer: The tokenizer of transformers.

    Raises:
        PlanError: If the checkpoint has no tokenizer, or one that cannot be loaded or begin a text.
    """

    def __init__(self, source: Source) -> None:
        from transformers import AutoTokenizer

        files = source.files()
        if not has_tokenizer(files):
            raise PlanError(
                f"{source.label} has no tokenizer, so text cannot be turned into tokens.",
                hint="add the tokenizer files of the source",
            )
        for file in sidecar_files(files):
            source.fetch(file)
        folder = source.fetch("config.json").parent
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise PlanError(
                f"the tokenizer of {source.label} cannot be loaded: "
                f"{(str(error).splitlines() or [type(error).__name__])[0]}",
                hint="repair the tokenizer files",
            ) from error
        self.last: int | None = self.tokenizer.eos_token_id
        first = self.tokenizer.bos_token_id
        first = self.last if first is None else first
        if first is None:
            raise PlanError(
                f"the tokenizer of {source.label} has no token that begins a text.",
                hint="name a bos_token or an eos_token in tokenizer_config.json",
            )
        self.first: int = first

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens."""
        # A document may exceed the model's context: it is cut by the caller, so the tokenizer need not warn.
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids


def check_same(ours: Tokens, theirs: Tokens, texts: Iterable[str]) -> None:
    """Checks that two checkpoints turn texts into the same ids.

    Raises:
        PlanError: If they do not, so that figures per token cannot be compared.
    """
    is_same = (ours.first, ours.last) == (theirs.first, theirs.last)
    if not is_same or any(ours.encode(text) != theirs.encode(text) for text in texts):
        raise PlanError(
            "the model and its base turn the text into different tokens, so their figures cannot be compared.",
            hint="pass the checkpoint that the model was made from as --base",
        )
