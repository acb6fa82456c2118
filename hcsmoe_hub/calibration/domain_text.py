"""The documents of one domain as token ids, cut into sequences."""

from collections.abc import Sequence
from itertools import chain
from typing import Self

import torch
from torch import Tensor

TokenIds = list[int]


def key_of(document: TokenIds) -> int:
    """A number that documents with the same tokens have in common."""
    return hash(tuple(document))


class DomainText:
    """Documents of one domain, joined in the order in which they were read.

    Args:
        name: What the records call the domain; empty where the whole source is one.
        length: Tokens of documents per sequence.
        documents: Token ids of the first documents.

    Attributes:
        documents: Token ids of every document.
        tokens: Tokens of all documents.
    """

    def __init__(self, name: str, length: int, documents: Sequence[TokenIds] = ()) -> None:
        self.name = name
        self.length = length
        self.documents: list[TokenIds] = []
        self.tokens = 0
        for document in documents:
            self.add(document)

    def like(self, name: str, documents: Sequence[TokenIds] = ()) -> Self:
        """Another domain whose documents are cut in the same way."""
        return type(self)(name, self.length, documents)

    @property
    def sequences(self) -> int:
        """Number of whole sequences."""
        return self.tokens // self.length

    @property
    def wanted(self) -> str:
        """What fills a sequence, in words."""
        return f"one sequence of {self.length}"

    def add(self, ids: TokenIds) -> None:
        """Appends a document."""
        self.documents.append(ids)
        self.tokens += len(ids)

    def pack(self, sequences: int) -> Tensor:
        """The first sequences, ``[sequences, length]`` int64."""
        stream = list(chain.from_iterable(self.documents[: self.touched(sequences)]))
        return torch.tensor(stream[: sequences * self.length], dtype=torch.int64).view(sequences, self.length)

    def touched(self, sequences: int) -> int:
        """Number of documents that have a token in the first sequences."""
        missing = sequences * self.length
        for number, document in enumerate(self.documents):
            if missing <= 0:
                return number
            missing -= len(document)
        return len(self.documents)

    def last(self, documents: Sequence[TokenIds], sequences: int) -> int:
        """The first of the last documents that fill a number of sequences together; 0 if all of them do not.

        Args:
            documents: Documents of this domain.
            sequences: Number of sequences.
        """
        first, tokens = len(documents), 0
        while first and tokens < sequences * self.length:
            first -= 1
            tokens += len(documents[first])
        return first
