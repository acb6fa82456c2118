"""Turns documents into token ids, and counts those that give nothing to calibrate on."""

import hashlib
from collections import Counter
from enum import StrEnum
from functools import cached_property
from typing import Any

from hcsmoe_hub.calibration.conversations import Conversation, with_text_arguments
from hcsmoe_hub.calibration.documents import Document
from hcsmoe_hub.calibration.library_failures import LibraryFailures, RejectedError, reason_of, rejection
from hcsmoe_hub.calibration.pairs import Pair
from hcsmoe_hub.calibration.templates import Templates
from hcsmoe_hub.calibration.tokenizer import encode_text
from hcsmoe_hub.errors import CalibrationError

# Words of a turn that are looked for in what the chat template makes of it.
SOUGHT_WORDS = 50
# Unusable rows after which a set is judged before its end: it may be endless.
PATIENCE = 100
_HINT = "check the rows, or name another column with `text_column`"


class Fault(StrEnum):
    """Why a row is left out."""

    UNREADABLE = "neither text nor chat messages"
    UNPAIRED = "without a usable pair of source and target"
    REJECTED = "rejected by the model's chat template"
    WORDLESS = "rendered by the model's chat template without their own words"
    REPEATED = "rendered by the model's chat template to the same text as another row"
    SILENT = "without tokens"


_OF_TEMPLATE = (Fault.REJECTED, Fault.WORDLESS, Fault.REPEATED)


class Encoder:
    """Token ids of documents, and the number of rows that have none.

    Args:
        tokenizer: The tokenizer of transformers.
        name: Name of the source of text in messages.
        separator: Ids after every plain text; a chat template ends a conversation itself.
        templates: Renders conversations.

    Attributes:
        rows: Rows so far that are not blank.
        faults: Those of them that were left out, by the reason.
    """

    def __init__(self, tokenizer: Any, name: str, *, separator: list[int], templates: Templates) -> None:
        self._tokenizer = tokenizer
        self._name = name
        self._separator = separator
        self._templates = templates
        self._origins: dict[bytes, bytes] = {}
        self._reasons: dict[Fault, str] = {}
        self.rows = 0
        self.faults: Counter[Fault] = Counter()

    def encode(self, document: Document | Pair) -> list[int]:
        """Token ids of a document; none if it is left out.

        Raises:
            CalibrationError: If the tokenizer fails, or most rows so far have been left out.
        """
        self.rows += 1
        assert not isinstance(document, Pair), "pairs are for models with an encoder"
        if isinstance(document, str):
            return self._encode_text(document)
        if self._tokenizer.chat_template is not None:
            return self._encode_conversation(document)
        if document.text is not None:
            return self._encode_text(document.text)
        raise CalibrationError(
            f"{self._name} holds chat messages, but the model's tokenizer has no chat template.",
            hint="pass plain text, or name a text column with `text_column`",
        )

    def skip(self, fault: Fault, reason: str = "") -> list[int]:
        """Counts a row that is left out, which adds no tokens.

        Raises:
            CalibrationError: If most of many rows have been left out.
        """
        self.faults[fault] += 1
        if reason:
            self._reasons.setdefault(fault, reason)
        if self.faults.total() >= PATIENCE:
            self.check()
        return []

    def skip_unreadable(self, reason: str) -> list[int]:
        """Counts a row that is neither text nor a conversation, which adds no tokens.

        Raises:
            CalibrationError: If most of many rows have been left out.
        """
        self.rows += 1
        return self.skip(Fault.UNREADABLE, reason)

    def check(self) -> None:
        """Checks that most rows could be used.

        Raises:
            CalibrationError: If more than half of them were left out.
        """
        if 2 * self.faults.total() > self.rows:
            raise CalibrationError(
                f"most rows of {self._name} give nothing to calibrate on, {self.account()}.", hint=self._hint()
            )

    def account(self) -> str:
        """The rows that were left out, in words: ``2 of 9: 2 without tokens``."""
        counts = [
            f"{count} {fault}" + (f" ({self._reasons[fault]})" if fault in self._reasons else "")
            for fault, count in self.faults.most_common()
        ]
        return f"{self.faults.total()} of {self.rows}: {', '.join(counts)}"

    def _hint(self) -> str:
        if self.faults.most_common(1)[0][0] in _OF_TEMPLATE:
            return "correct the model's chat template, or name a column of plain text with `text_column`"
        return _HINT

    def _encode_text(self, text: str) -> list[int]:
        ids = encode_text(self._tokenizer, text, self._explain)
        return ids + self._separator if ids else self.skip(Fault.SILENT)

    def _encode_conversation(self, conversation: Conversation) -> list[int]:
        said = list(conversation.texts())
        if not said:
            return self.skip(Fault.SILENT)
        try:
            rendered = self._render(conversation)
        except RejectedError as error:
            return self.skip(Fault.REJECTED, error.message)
        if not rendered.strip():
            return self.skip(Fault.SILENT)
        if not any(_is_rendered(text, rendered) for text in said):
            return self.skip(Fault.WORDLESS)
        content = _digest(repr((conversation.turns, conversation.tools)))
        if self._origins.setdefault(_digest(rendered), content) != content:
            return self.skip(Fault.REPEATED)
        return self._encode_rendered(conversation, rendered) or self.skip(Fault.SILENT)

    def _render(self, conversation: Conversation) -> str:
        """What the chat template makes of a conversation.

        Raises:
            RejectedError: If it fails, with the arguments of tool calls as objects and as text.
            CalibrationError: If it takes too much time or memory.
        """
        try:
            return self._apply_template(conversation)
        except RejectedError:
            rewritten = with_text_arguments(conversation.turns)
            if rewritten == conversation.turns:
                raise
        conversation.turns[:] = rewritten
        return self._apply_template(conversation)

    def _apply_template(self, conversation: Conversation) -> str:
        if not self._has_own_form:
            return self._templates.render(self._tokenizer, conversation.turns, conversation.tools)
        with LibraryFailures(rejection):
            return str(self._apply_own_form(conversation, tokenize=False))

    def _encode_rendered(self, conversation: Conversation, rendered: str) -> list[int]:
        if not self._has_own_form:
            return encode_text(self._tokenizer, rendered, self._explain, add_special_tokens=False)
        with LibraryFailures(self._explain):
            ids: list[int] = self._apply_own_form(conversation, tokenize=True)
            return ids

    @cached_property
    def _has_own_form(self) -> bool:
        """Whether a library forms the conversations of this tokenizer, as Mistral's does, and not a template."""
        from transformers import PreTrainedTokenizerBase

        return type(self._tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template

    def _apply_own_form(self, conversation: Conversation, *, tokenize: bool) -> Any:
        return self._tokenizer.apply_chat_template(
            conversation.turns, tools=conversation.tools, tokenize=tokenize, return_dict=False
        )

    def _explain(self, error: BaseException) -> CalibrationError:
        return CalibrationError(
            f"the model's tokenizer fails on a text of {self._name}: {reason_of(error)}",
            hint="repair the tokenizer files, or pass token ids with `dataset='IDS.npy'`",
        )


def _is_rendered(text: str, rendered: str) -> bool:
    """Whether at least half of the first words of a turn are in what the chat template made of its conversation."""
    words = set(text.split(None, SOUGHT_WORDS)[:SOUGHT_WORDS])
    return 2 * sum(word in rendered for word in words) >= len(words)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
