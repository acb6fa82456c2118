"""The texts of a conversion in ``hcsmoe.json``: what it looked at, and what it was measured on."""

from typing import NotRequired

# Pydantic takes those of Python itself from 3.12 on.
from typing_extensions import TypedDict


class CalibrationDomain(TypedDict):
    """One domain of the calibration text; ``measured_tokens`` are other ones, on which the result was measured."""

    domain: str
    sequences: int
    tokens: int
    measured_tokens: int


class CalibrationSource(TypedDict):
    """One of several sources of calibration text; ``sha256`` is that of a file's bytes, null for anything else.

    ``domain`` is its name, unlike that of any other source.
    """

    dataset: str
    share: float
    sequences: int
    tokens: int
    domain: str
    sha256: str | None


class CalibrationRecord(TypedDict):
    """What the experts were observed on; ``sha256`` is that of the token ids, little-endian int64.

    ``source_length`` is there for models with an encoder, into which the first so many tokens of each sequence go,
    and ``is_split`` says that the options named the number.
    ``sources`` is there if there are several; the order of their sequences follows from their shares. ``domains`` is
    missing from reports of earlier versions.
    """

    dataset: str
    sequences: int
    sequence_length: int
    source_length: NotRequired[int]
    is_split: NotRequired[bool]
    tokens: int
    seed: int
    text_column: str | None
    feature_tokens: int
    sha256: str
    dataset_sha256: str | None
    domains: NotRequired[list[CalibrationDomain]]
    sources: NotRequired[list[CalibrationSource]]


class MeasuredRow(TypedDict):
    """How well the source and the result predict the next token of a text, and how far apart their predictions are.

    ``ratio`` is the perplexity of the result over that of the source; ``kl`` the mean Kullback-Leibler divergence of
    the result's predictions from the source's, in nats per token; ``top1_agreement`` the share of tokens, 0 to 1, for
    which both find the same token most likely.
    """

    tokens: int
    perplexity_before: float
    perplexity_after: float
    ratio: float
    kl: float
    top1_agreement: float


class Measured(TypedDict):
    """What a conversion cost, measured on held-out text of the calibration set, to which nothing was fitted.

    ``sha256`` is that of the token ids, little-endian int64; ``domains`` is empty where domains are not known. With
    ``source_length``, an encoder read the first so many tokens of each sequence, and the others were predicted.
    """

    sequences: int
    sequence_length: int
    source_length: NotRequired[int]
    sha256: str
    overall: MeasuredRow
    domains: dict[str, MeasuredRow]
