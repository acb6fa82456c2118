"""Turns pairs into token ids with the special tokens that a tokenizer gives to sources and to targets."""

from collections.abc import Callable
from typing import Any

from hcsmoe_hub.calibration.domain_text import TokenIds
from hcsmoe_hub.calibration.library_failures import LibraryFailures
from hcsmoe_hub.calibration.pairs import Pair, UnpairedError
from hcsmoe_hub.errors import HcsmoeError

# The first of them marks the first span that was cut out of a text.
_SENTINEL = "<extra_id_{}>"


class PairIds(TokenIds):
    """Token ids of a pair: those of its source, then those of its target.

    Args:
        source: Ids of the source.
        target: Ids of the target.
    """

    __slots__ = ("split",)

    def __init__(self, source: TokenIds, target: TokenIds) -> None:
        super().__init__([*source, *target])
        self.split = len(source)

    @property
    def source(self) -> TokenIds:
        """Ids for the encoder."""
        return self[: self.split]

    @property
    def target(self) -> TokenIds:
        """Ids that the decoder is to predict."""
        return self[self.split :]


class PairTokens:
    """Encodes pairs; tokenizers of translation models mark the languages.

    Args:
        tokenizer: The tokenizer of transformers.
        explain: Makes the failure to raise when the tokenizer fails.
    """

    def __init__(self, tokenizer: Any, explain: Callable[[BaseException], HcsmoeError]) -> None:
        self._tokenizer = tokenizer
        self._explain = explain
        self._has_languages = hasattr(tokenizer, "src_lang")
        self._source_lang = getattr(tokenizer, "src_lang", None)
        self._target_lang = getattr(tokenizer, "tgt_lang", None)

    def encode(self, pair: Pair) -> PairIds:
        """Token ids of a pair.

        Raises:
            UnpairedError: If its languages are not known.
            HcsmoeError: If the tokenizer fails.
        """
        tokenizer = self._tokenizer
        if self._has_languages:
            source_lang = self._checked(pair.source_lang or self._source_lang, "source", pair)
            target_lang = self._checked(pair.target_lang or self._target_lang, "target", pair)
        with LibraryFailures(self._explain):
            if self._has_languages:
                tokenizer.src_lang, tokenizer.tgt_lang = source_lang, target_lang
            source = tokenizer(pair.source, verbose=False)["input_ids"]
            target = tokenizer(text_target=pair.target, verbose=False)["input_ids"]
        return PairIds(source, target)

    def _checked(self, language: str | None, side: str, pair: Pair) -> str:
        """A language that the tokenizer has a token for."""
        if language is None:
            raise UnpairedError(
                f"{pair.row} does not name its {side} language, and nor does the tokenizer: add a column {side}_lang"
            )
        if self._tokenizer.convert_tokens_to_ids(language) in (None, self._tokenizer.unk_token_id):
            raise UnpairedError(
                f"the tokenizer does not know the {side} language {language!r:.40} of {pair.row}: name it in a column "
                f"{side}_lang"
            )
        return language


def find_sentinels(tokenizer: Any) -> list[int]:
    """Ids of ``<extra_id_0>`` and those that follow, as T5 tokenizers have them; empty for other tokenizers."""
    vocabulary, found = tokenizer.get_vocab(), list[int]()
    while (name := _SENTINEL.format(len(found))) in vocabulary:
        found.append(vocabulary[name])
    return found
