"""The tokenizer of a checkpoint, as used by evaluations."""

from collections.abc import Iterable
from functools import partial
from typing import Any

from hcsmoe_hub.calibration.library_failures import reason_of
from hcsmoe_hub.calibration.pair_tokens import PairIds, PairTokens
from hcsmoe_hub.calibration.pairs import Pair, UnpairedError
from hcsmoe_hub.calibration.tokenizer import encode_text, load_tokenizer, repair_hint
from hcsmoe_hub.checkpoint.sidecars import has_tokenizer, sidecar_files
from hcsmoe_hub.checkpoint.source import Source
from hcsmoe_hub.errors import PlanError


class Tokens:
    """Text to token ids without special tokens, and the ids that begin and end a text.

    Args:
        source: The checkpoint.
        vocab_size: Ids must be below this; ``None`` does not check them.

    Attributes:
        first: Id that a text begins with: ``<bos>``, or ``<eos>`` if the tokenizer has no ``<bos>``.
        last: Id that ends a text, ``None`` if there is none.
        has_languages: Whether it marks the languages of source and target.
        tokenizer: The tokenizer of transformers.

    Raises:
        PlanError: If the checkpoint has no tokenizer, or its tokenizer cannot be loaded, has neither token, or gives
            an id that is outside the vocabulary.
    """

    def __init__(self, source: Source, *, vocab_size: int | None = None) -> None:
        files = source.files()
        if not has_tokenizer(files):
            raise PlanError(
                f"{source.label} has no tokenizer, so text cannot be turned into tokens.",
                hint="add the tokenizer files of the source",
            )
        for file in sidecar_files(files, source.loose_text):
            source.fetch(file)
        folder = source.fetch("config.json").parent
        self._label, self._vocab_size = source.label, vocab_size
        self.tokenizer: Any = load_tokenizer(folder, partial(self._explain, "cannot be loaded"))
        self.last: int | None = self.tokenizer.eos_token_id
        first = self.tokenizer.bos_token_id
        first = self.last if first is None else first
        if first is None:
            raise PlanError(
                f"the tokenizer of {source.label} has neither a bos_token nor an eos_token to begin a text with.",
                hint="set one of them in tokenizer_config.json",
            )
        self.first: int = first
        self.has_languages = hasattr(self.tokenizer, "src_lang")
        self._pairs = PairTokens(self.tokenizer, partial(self._explain, "fails on a text"))
        self._check([first])

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Ids of a text.

        Args:
            text: The text.
            add_special_tokens: Whether the tokenizer adds the special tokens that it begins and ends texts with.

        Raises:
            PlanError: If the tokenizer fails, or gives an id that is outside the vocabulary.
        """
        explain = partial(self._explain, "fails on a text")
        ids = encode_text(self.tokenizer, text, explain, add_special_tokens=add_special_tokens)
        self._check(ids)
        return ids

    def encode_pair(self, pair: Pair) -> PairIds:
        """Ids of a source and its target, with the special tokens of the tokenizer.

        Raises:
            PlanError: If the tokenizer fails, gives an id that is outside the vocabulary, or lacks a language.
        """
        try:
            ids = self._pairs.encode(pair)
        except UnpairedError as error:
            raise PlanError(
                f"{error}.", hint="correct the file, or set src_lang and tgt_lang in tokenizer_config.json"
            ) from error
        self._check(ids)
        return ids

    def _check(self, ids: list[int]) -> None:
        highest = max(ids, default=0)
        if self._vocab_size is not None and highest >= self._vocab_size:
            raise PlanError(
                f"the tokenizer of {self._label} gives the token id {highest}, but the model's vocabulary of "
                f"{self._vocab_size} tokens ends at {self._vocab_size - 1}.",
                hint="use the tokenizer files that belong to the model",
            )

    def _explain(self, what: str, error: BaseException) -> PlanError:
        return PlanError(f"the tokenizer of {self._label} {what}: {reason_of(error)}", hint=repair_hint(error))


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
