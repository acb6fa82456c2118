"""Reads one source of text, document by document, and sorts the documents by their domains."""

from collections import deque
from collections.abc import Iterator, Mapping
from itertools import chain

from hcsmoe_hub.calibration.conversations import UnreadableError
from hcsmoe_hub.calibration.documents import Document
from hcsmoe_hub.calibration.domain_text import DomainText, TokenIds, key_of
from hcsmoe_hub.calibration.encode import Encoder
from hcsmoe_hub.calibration.pairs import Pair

# Domain of records that name none, and of domains that fill no sequence.
OTHER = "other"
# Rows that are looked through for a rare domain, on top of as many as have been read.
_PATIENCE = 1000

# Shares of the bundled text: what models are used for most has more of it. The other domains count once.
BUNDLED_WEIGHTS: Mapping[str, int] = {
    **dict.fromkeys(("code", "manual", "prose"), 3),
    **dict.fromkeys(("dialogue", "mathematics", "french", "german", "spanish"), 2),
}

# The domain of a row, and its document: text, a conversation, a pair, token ids, or why there is none.
Item = tuple[str, Document | Pair | TokenIds | UnreadableError]


class SourceText:
    """The documents of one source as token ids, by domain.

    Args:
        items: Documents in shuffled order.
        encoder: Turns documents into token ids.
        cut: A text without documents, cut as that of every domain is.
        weights: Shares of the domains in proportion to each other, 1 for those that are not named, as far as the text
            allows; then all items are held in memory. ``None`` for the shares of the text.

    Attributes:
        domains: The text read so far by the names of its domains, in the order in which they appeared.
    """

    def __init__(
        self, items: Iterator[Item], encoder: Encoder, *, cut: DomainText, weights: Mapping[str, int] | None
    ) -> None:
        self._encoder = encoder
        self._cut = cut
        self._items = items
        self._rows = 0
        self._waiting: dict[str, deque[Item]] | None = None
        self.domains: dict[str, DomainText] = {}
        self._weights = weights
        if weights is not None:
            self._waiting = {}
            for item in items:
                self._waiting.setdefault(item[0], deque()).append(item)

    @property
    def tokens(self) -> int:
        """Tokens of all documents read so far."""
        return sum(text.tokens for text in self.domains.values())

    def fill(self, sequences: int) -> dict[str, int]:
        """Reads until there are enough sequences, or no more text.

        Args:
            sequences: Number of sequences of all domains together.

        Returns:
            Number of sequences of each domain that has one.
        """
        counts = self._fill_by_weight(sequences) if self._waiting is not None else self._fill_as_read(sequences)
        return {name: count for name, count in counts.items() if count}

    def _fill_as_read(self, sequences: int) -> dict[str, int]:
        found, name = 0, ""
        while found < sequences:
            read = self._next(None)
            if read is None:
                self._join_small()
                break
            name, ids = read
            text = self._text(name)
            found -= text.sequences
            text.add(ids)
            found += text.sequences
        counts = {name: text.sequences for name, text in self.domains.items()}
        # A long document may fill more sequences than are wanted.
        if found > sequences:
            counts[name] -= found - sequences
        return counts

    def _fill_by_weight(self, sequences: int) -> dict[str, int]:
        assert self._waiting is not None
        assert self._weights is not None
        weights = {name: self._weights.get(name, 1) for name in self._waiting}
        counts = dict.fromkeys(self._waiting, 0)
        unfinished = list(counts)
        while unfinished and sum(counts.values()) < sequences:
            name = min(unfinished, key=lambda name: counts[name] / weights[name])
            text = self._text(name)
            while text.sequences == counts[name] and (read := self._next(name)) is not None:
                text.add(read[1])
            if text.sequences == counts[name]:
                unfinished.remove(name)
            else:
                counts[name] += 1
        return counts

    def _join_small(self) -> None:
        """Makes one domain of those that do not fill a sequence, if it fills one."""
        small = [name for name, text in self.domains.items() if not text.sequences]
        is_all = len(small) == len(self.domains)
        documents = list(chain.from_iterable(self.domains[name].documents for name in small))
        if len(small) > 1 and self._cut.like(OTHER, documents).sequences:
            for name in small:
                del self.domains[name]
            joined = self._text("" if is_all else OTHER)
            for document in documents:
                joined.add(document)

    def read_rest(self, rest: dict[str, DomainText], wanted: dict[str, int], known: set[int]) -> None:
        """Reads on for the sequences that a conversion is measured on.

        Args:
            rest: Text of each domain that may be measured on; new documents are added to it.
            wanted: Number of sequences of each of these domains.
            known: Keys of documents that must not be measured on.
        """
        last_row = 2 * self._rows + _PATIENCE
        for name, count in wanted.items():
            while rest[name].sequences < count and self._rows < last_row and (read := self._next(name)) is not None:
                found, ids = read
                if found in rest and key_of(ids) not in known:
                    rest[found].add(ids)

    def _text(self, name: str) -> DomainText:
        return self.domains.setdefault(name, self._cut.like(name))

    def _next(self, name: str | None) -> tuple[str, TokenIds] | None:
        """The next document with tokens; of a domain, if each has a queue of its own. ``None`` after the last one."""
        while (item := self._pop(name)) is not None:
            self._rows += 1
            domain, document = item
            if isinstance(document, UnreadableError):
                self._encoder.skip_unreadable(str(document))
            elif ids := document if isinstance(document, list) else self._encoder.encode(document):
                return domain, ids
        return None

    def _pop(self, name: str | None) -> Item | None:
        if self._waiting is None:
            return next(self._items, None)
        assert name is not None, "a balanced source is read by domain"
        return self._waiting[name].popleft() if self._waiting[name] else None
