"""Plans a calibration set: where its text comes from, and how many sequences of which length it has."""

from dataclasses import dataclass

from hcsmoe_hub.calibration.shares import interleave
from hcsmoe_hub.calibration.sources import TextSource, check_source, parse_sources
from hcsmoe_hub.calibration.token_ids import open_token_ids
from hcsmoe_hub.errors import CalibrationError, PlanError
from hcsmoe_hub.options import DEFAULT_SEQUENCE_LENGTH, CalibrationOptions, default_samples

# Sequences that show whether every source has a part in a set.
_ENOUGH = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationPlan:
    """Calibration text, and how it is cut into sequences.

    Attributes:
        dataset: As the user named it.
        sequences: Maximum number of sequences.
        sequence_length: Tokens per sequence.
        seed: Seed of the document shuffle.
        text_column: Column with the text, ``None`` to find it.
        is_token_ids: Whether the file holds token ids, which are used unchanged.
        measures: Whether to read text to measure on, too.
        holds_back: Whether some sequences are measured on instead, where the text has nothing left to measure on.
    """

    dataset: str
    sequences: int
    sequence_length: int
    seed: int
    text_column: str | None
    is_token_ids: bool
    measures: bool = True
    holds_back: bool = False

    @property
    def tokens(self) -> int:
        """Maximum number of tokens."""
        return self.sequences * self.sequence_length

    @property
    def sources(self) -> tuple[TextSource, ...]:
        """Where the text comes from, with shares."""
        return parse_sources(self.dataset)

    def order(self, sequences: int) -> list[int]:
        """The source of each sequence, as an index into ``sources``.

        Sources alternate so that every beginning of the set has their shares as closely as whole sequences allow, and
        a larger set begins like a smaller one. Within a source, its domains alternate in the same way; only the loaded
        set knows them.

        Args:
            sequences: Number of sequences.
        """
        return interleave([source.share for source in self.sources], sequences)

    def counts(self, sequences: int) -> list[int]:
        """Sequences of every source.

        Args:
            sequences: Number of sequences of all sources together.
        """
        order = self.order(sequences)
        return [order.count(index) for index in range(len(self.sources))]


def plan_calibration(
    options: CalibrationOptions, *, max_positions: int | None, has_tokenizer: bool, label: str, fits: bool
) -> CalibrationPlan:
    """Checks the calibration options against the model, without reading text.

    Args:
        options: The calibration options.
        max_positions: Maximum sequence length of the model, ``None`` if its config does not state one.
        has_tokenizer: Whether the model has a tokenizer.
        label: Name of the model in messages.
        fits: Whether a refit will be fitted to the text.

    Raises:
        PlanError: If a tokenizer is missing or the sequences are longer than the model accepts.
        CalibrationError: If a file does not exist or its type is unknown, or shares are not valid.
    """
    sources = parse_sources(options.dataset)
    is_token_ids = len(sources) == 1 and sources[0].is_token_ids
    if is_token_ids:
        sequences, length = open_token_ids(sources[0].path).shape
    else:
        _check_sources(sources)
        if not has_tokenizer:
            raise PlanError(
                f"{label} has no tokenizer, so calibration text cannot be turned into tokens.",
                hint="add the tokenizer files, or pass token ids with `dataset='IDS.npy'`",
            )
        length = options.sequence_length or min(DEFAULT_SEQUENCE_LENGTH, max_positions or DEFAULT_SEQUENCE_LENGTH)
        sequences = options.samples or default_samples(length, fits=fits)
    if max_positions is not None and length > max_positions:
        raise PlanError(
            f"sequences of {length} tokens are longer than the {max_positions} positions of {label}.",
            hint=f"cut them to {max_positions} ids or fewer"
            if is_token_ids
            else f"use `sequence_length={max_positions}` or less",
        )
    plan = CalibrationPlan(
        dataset=options.dataset,
        sequences=sequences,
        sequence_length=length,
        seed=options.seed,
        text_column=options.text_column,
        is_token_ids=is_token_ids,
        holds_back=fits and options.samples is None and not is_token_ids,
    )
    _check_shares(plan)
    return plan


def _check_sources(sources: tuple[TextSource, ...]) -> None:
    for source in sources:
        if source.is_token_ids:
            raise CalibrationError(
                f"{source.text} holds token ids, which cannot be mixed with other sources.",
                hint=f"use `dataset='{source.text}'` alone",
            )
        check_source(source)


def _check_shares(plan: CalibrationPlan) -> None:
    # Counts only grow with the set, so the beginning of a large one says enough.
    for source, count in zip(plan.sources, plan.counts(min(plan.sequences, _ENOUGH)), strict=True):
        if count == 0:
            raise CalibrationError(
                f"the share of {source.text} is less than one of {plan.sequences} sequences.",
                hint="use more `samples`, or a larger share",
            )
