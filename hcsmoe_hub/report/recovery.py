"""What ``hcsmoe.json`` says of a result that was trained on the logits of its source."""

from typing import NotRequired

# Pydantic takes those of Python itself from 3.12 on.
from typing_extensions import TypedDict

from hcsmoe_hub.report.texts import CalibrationDomain


class RecoveryTeacher(TypedDict):
    """Whose logits a result was trained on: ``repo_id`` or ``path``, the name of a folder; the other one is null."""

    repo_id: str | None
    path: str | None
    revision: str | None
    fingerprint: str


class RecoveryData(TypedDict):
    """The text of a recovery; ``sha256`` is that of its token ids, held-out ones last, little-endian int64.

    ``sequences`` and ``tokens`` are those that were there to be trained on, ``held_out_tokens`` the others. Of models
    with an encoder, ``source_length`` is the number of tokens of each sequence, the first ones, that it read,
    ``is_split`` says whether the options named the number, and ``sides`` what sources and targets were: ``pairs``,
    ``spans`` cut out of text, or ``ids`` of a file. Perplexity and divergence are those of the targets.
    """

    dataset: str
    dataset_sha256: str | None
    text_column: str | None
    sequences: int
    sequence_length: int
    source_length: NotRequired[int]
    is_split: NotRequired[bool]
    sides: NotRequired[str]
    tokens: int
    held_out_tokens: int
    sha256: str
    domains: list[CalibrationDomain]


class RecoverySettings(TypedDict):
    """How a result was trained; ``batch_tokens`` are those of one step, of all processes together.

    ``lora_rank`` is null without LoRA; ``top_logits`` is the number of logits per token that the teacher's were cut to,
    null if all of them counted.
    """

    train: list[str]
    lora_rank: int | None
    temperature: float
    kd_weight: float
    text_weight: float
    learning_rate: float
    batch_tokens: int
    dtype: str
    seed: int
    held_out: float
    max_steps: int | None
    max_minutes: float | None
    evaluate_every: int
    patience: int | None
    top_logits: int | None


class RecoveryScore(TypedDict):
    """A result on held-out text: its perplexity, and its mean KL divergence from the teacher in nats per token."""

    perplexity: float
    kl: float


class RecoveryPoint(TypedDict):
    """The perplexity on held-out text after a number of steps."""

    step: int
    perplexity: float


class RecoveryRecord(TypedDict):
    """What a recovery did.

    ``kept_step`` is the number of steps after which the weights were written, 0 if the untrained ones were better than
    all others; ``steps`` were made, on ``tokens`` tokens, each counted as often as it was seen. ``stopped`` says what
    ended the training: ``steps``, ``time`` or ``patience``. ``trained_tensors`` counts stored tensors that changed,
    ``trained_parameters`` the numbers that were trained. ``history`` begins with the untrained weights.
    """

    teacher: RecoveryTeacher
    data: RecoveryData
    settings: RecoverySettings
    kept_step: int
    steps: int
    tokens: int
    seconds: float
    stopped: str
    trained_parameters: int
    trained_tensors: int
    before: RecoveryScore
    after: RecoveryScore
    history: list[RecoveryPoint]
    tool_version: str
    versions: dict[str, str]
