"""Turns the documents of a source into token ids for models with an encoder and a decoder."""

from typing import Any

from hcsmoe_hub.calibration.documents import Document
from hcsmoe_hub.calibration.encode import Encoder, Fault
from hcsmoe_hub.calibration.pair_tokens import PairTokens
from hcsmoe_hub.calibration.pairs import Pair, UnpairedError
from hcsmoe_hub.calibration.templates import Templates
from hcsmoe_hub.calibration.tokenizer import encode_text
from hcsmoe_hub.errors import CalibrationError


class SidesEncoder(Encoder):
    """Token ids of pairs, or of text whose spans are cut out later, and the number of rows that have none.

    Args:
        tokenizer: The tokenizer of transformers.
        name: Name of the source of text in messages.
        templates: As for ``Encoder``; conversations are refused.
        are_pairs: Whether pairs are encoded; otherwise text is.
    """

    def __init__(self, tokenizer: Any, name: str, *, templates: Templates, are_pairs: bool) -> None:
        super().__init__(tokenizer, name, separator=[], templates=templates)
        self._pairs = PairTokens(tokenizer, self._explain) if are_pairs else None

    def encode(self, document: Document | Pair) -> list[int]:
        """Token ids of a pair, as ``PairIds``, or of a text without special tokens; none if it is left out.

        Raises:
            CalibrationError: If it is a conversation, the tokenizer fails, or most rows so far have been left out.
        """
        if not isinstance(document, Pair | str):
            raise refused_chat(self._name)
        if isinstance(document, str) == (self._pairs is not None):
            found, others = ("text", "pairs") if self._pairs is not None else ("a pair", "text")
            return self.skip_unreadable(f"a row holds {found} among {others}")
        self.rows += 1
        if isinstance(document, str):
            return encode_text(self._tokenizer, document, self._explain, add_special_tokens=False) or self.skip(
                Fault.SILENT
            )
        assert self._pairs is not None, "pairs among text are left out"
        try:
            return self._pairs.encode(document)
        except UnpairedError as error:
            return self.skip(Fault.UNPAIRED, str(error))

    def skip_unreadable(self, reason: str) -> list[int]:
        self.rows += 1
        return self.skip(Fault.UNPAIRED, reason)


def refused_chat(name: str) -> CalibrationError:
    """The refusal of a source that holds chat messages, or questions and answers whose sides are not named."""
    return CalibrationError(
        f"{name} holds chat messages, but models with an encoder and a decoder have no chat template: they are "
        "calibrated on pairs of source and target, or on text.",
        hint="name the columns of a pair as in `text_column='question,answer'`, or one column of text",
    )
