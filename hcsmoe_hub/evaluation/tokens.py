"""The tokenizer of a checkpoint, as used by evaluations."""

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
        first: Id that a text begins with: ``<bos>``, or ``<eos>`` if the tokenizer has no ``<bos>``.
        last: Id that ends a text, ``None`` if there is none.
        tokenizer: The tokenizer of transformers.

    Raises:
        PlanError: If the checkpoint has no tokenizer, or its tokenizer cannot be loaded or has neither token.
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
                f"the tokenizer of {source.label} has neither a bos_token nor an eos_token to begin a text with.",
                hint="set one of them in tokenizer_config.json",
            )
        self.first: int = first

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens."""
        # A document may exceed the model's context; the caller cuts it, so the tokenizer need not warn.
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids


def check_same(ours: Tokens, theirs: Tokens, texts: Iterable[str]) -> None:
    """Checks that two checkpoints turn texts into the same ids.

    Raises:
        PlanError: If they do not, in which case per-token figures are not comparable.
    """
    is_same = (ours.first, ours.last) == (theirs.first, theirs.last)
    if not is_same or any(ours.encode(text) != theirs.encode(text) for text in texts):
        raise PlanError(
            "the model and its base tokenize the text differently, so their figures cannot be compared.",
            hint="pass the checkpoint that the model was made from as `base`",
        )
