"""Plans a calibration set: where its text comes from, and how many sequences of which length it has."""

from dataclasses import dataclass

from hcsmoe_hub.calibration.denoising import corruption_to
from hcsmoe_hub.calibration.shares import interleave
from hcsmoe_hub.calibration.sources import SELF, TextSource, check_source, parse_sources
from hcsmoe_hub.calibration.token_ids import holds_token_ids, open_token_ids
from hcsmoe_hub.errors import CalibrationError, PlanError
from hcsmoe_hub.options import CalibrationOptions, default_length, default_samples

# Sequences that show whether every source has a part in a set.
_ENOUGH = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationPlan:
    """Calibration text, and how it is cut into sequences.

    Attributes:
        dataset: As the user named it.
        sequences: Maximum number of sequences.
        sequence_length: Tokens per sequence.
        source_length: How many of them, the first ones, go into the encoder; the others are the decoder's labels. Until
            the text is read, what it would be for text whose spans are cut out, unless the options say. 0 for a model
            that has a decoder alone.
        seed: Seed of the document shuffle.
        text_column: Column with the text, or both columns of a pair; ``None`` to find them.
        is_token_ids: Whether the file holds token ids, which are used unchanged.
        measures: Whether to read text to measure on, too.
        holds_back: Whether some sequences are measured on instead, where the text has nothing left to measure on.
        is_split: Whether the options say how many tokens go into the encoder.
        held_out: Share of the sequences that is measured on although there may be more text; ``None`` outside a
            recovery.
    """

    dataset: str
    sequences: int
    sequence_length: int
    seed: int
    text_column: str | None
    is_token_ids: bool
    measures: bool = True
    holds_back: bool = False
    source_length: int = 0
    is_split: bool = False
    held_out: float | None = None

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
    options: CalibrationOptions,
    *,
    max_positions: int | None,
    has_tokenizer: bool,
    label: str,
    fits: bool,
    is_encoder_decoder: bool = False,
) -> CalibrationPlan:
    """Checks the calibration options against the model, without reading text.

    Args:
        options: The calibration options.
        max_positions: Maximum sequence length of the model, ``None`` if its config does not state one.
        has_tokenizer: Whether the model has a tokenizer.
        label: Name of the model in messages.
        fits: Whether a refit will be fitted to the text.
        is_encoder_decoder: Whether the first tokens of a sequence go into an encoder.

    Raises:
        PlanError: If a tokenizer is missing, the sequences are longer than the model accepts, or they cannot be split
            between the encoder and the decoder.
        CalibrationError: If a file does not exist or its type is unknown, or shares are not valid.
    """
    sources = parse_sources(options.dataset)
    is_token_ids = len(sources) == 1 and sources[0].is_token_ids
    if is_token_ids:
        sequences, length = open_token_ids(sources[0].path).shape
    else:
        _check_sources(sources)
        if is_encoder_decoder:
            _check_written(sources, label)
        if not has_tokenizer:
            raise PlanError(
                f"{label} has no tokenizer, so calibration text cannot be turned into tokens.",
                hint="add the tokenizer files, or pass token ids with `dataset='IDS.npy'`",
            )
        length = options.sequence_length or default_length(max_positions, is_encoder_decoder=is_encoder_decoder)
        sequences = options.samples or default_samples(length, fits=fits)
    source_length = _source_length(options, length, label=label, is_encoder_decoder=is_encoder_decoder)
    plan = CalibrationPlan(
        dataset=options.dataset,
        sequences=sequences,
        sequence_length=length,
        seed=options.seed,
        text_column=options.text_column,
        is_token_ids=is_token_ids,
        holds_back=fits and options.samples is None and not is_token_ids,
        source_length=source_length,
        is_split=options.source_length is not None,
    )
    if max_positions is not None:
        _check_positions(plan, max_positions, label)
    _check_shares(plan)
    return plan


def _check_positions(plan: CalibrationPlan, most: int, label: str) -> None:
    # Until text is read, each side may turn out to be nearly all of a sequence.
    is_known = plan.is_token_ids or plan.is_split
    longest = max(plan.source_length, plan.sequence_length - plan.source_length) if is_known else plan.sequence_length
    if longest > most:
        raise PlanError(
            f"sequences of {longest} tokens are longer than the {most} positions of {label}.",
            hint=f"cut them to {most} ids or fewer" if plan.is_token_ids else f"use `sequence_length={most}` or less",
        )


def _source_length(options: CalibrationOptions, length: int, *, label: str, is_encoder_decoder: bool) -> int:
    """Tokens of a sequence that go into the encoder; 0 without one."""
    if not is_encoder_decoder:
        if options.source_length is not None:
            raise PlanError(
                f"`source_length={options.source_length}` splits sequences between an encoder and a decoder, but "
                f"{label} has a decoder alone.",
                hint="leave `source_length` out",
            )
        return 0
    source_length = options.source_length
    if source_length is None:
        corruption = None if holds_token_ids(options.dataset) else corruption_to(length)
        source_length = length // 2 if corruption is None else corruption.source_length
    if not 0 < source_length < length:
        raise PlanError(
            f"sequences of {length} tokens cannot give {source_length} to the encoder of {label}: encoder and decoder "
            "need at least one each.",
            hint="use longer sequences, or a smaller `source_length`",
        )
    return source_length


def _check_written(sources: tuple[TextSource, ...], label: str) -> None:
    """Refuses text that a model writes: what an encoder would read, nobody has written."""
    for source in sources:
        if source.location == SELF or source.is_server:
            raise PlanError(
                f"{source.name} is text that a model writes without a source, but {label} has an encoder, which reads "
                "one.",
                hint='pass pairs, rows such as {"source": "...", "target": "..."}, or text',
            )


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
