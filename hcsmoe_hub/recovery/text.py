"""The text of a recovery: sequences to train on, and held-out ones of other documents.

N sequences to train on, M held-out ones, of L tokens each, of
which an encoder may read the first ones. B sequences of a batch, T labels of each.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hcsmoe_hub.calibration.calibration_set import CalibrationSet
from hcsmoe_hub.calibration.plan import CalibrationPlan, plan_calibration
from hcsmoe_hub.calibration.sources import SELF, dataset_digest, dataset_name, parse_sources
from hcsmoe_hub.calibration.text import load_calibration
from hcsmoe_hub.calibration.token_ids import fingerprint
from hcsmoe_hub.checkpoint.sidecars import has_tokenizer, sidecar_files
from hcsmoe_hub.errors import CalibrationError, HcsmoeError, PlanError
from hcsmoe_hub.events import Listener
from hcsmoe_hub.machine import ranks
from hcsmoe_hub.model.sequences import predicted_tokens
from hcsmoe_hub.model.source_model import SourceModel
from hcsmoe_hub.options import CalibrationOptions, default_length
from hcsmoe_hub.recovery.options import DEFAULT_LENGTH, DEFAULT_TOKENS, LEAST_TOKENS, RecoverOptions
from hcsmoe_hub.report import CalibrationDomain, RecoveryData
from hcsmoe_hub.result.make_report import domain_records

# Held-out tokens that are scored at most: each score takes the time of as many tokens, and more of them say no more.
SCORED_TOKENS = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RecoveryText:
    """Packed sequences of equal length.

    Attributes:
        plan: What was read.
        train_NL: Token ids to train on, ``[N, L]`` int64.
        held_out_ML: Token ids of other documents, ``[M, L]`` int64.
        domains: What each domain has of both.
        source_length: Tokens of every sequence, the first ones, that an encoder reads; 0 for a decoder alone.
        are_pairs: Whether these and the others are the source and the target of pairs.
    """

    plan: CalibrationPlan
    train_NL: Tensor
    held_out_ML: Tensor
    domains: Sequence[CalibrationDomain]
    source_length: int = 0
    are_pairs: bool = False

    @property
    def logit_length(self) -> int:
        """Logits of every sequence: one for each of its tokens, or for those of the decoder behind an encoder."""
        return self.train_NL.shape[1] - self.source_length

    def labels(self, ids_BL: Tensor) -> Tensor:
        """The tokens that the first T logits of some sequences are about, ``[B, T]``; a last logit may be about none.

        Args:
            ids_BL: Token ids, ``[B, L]`` int64.
        """
        return predicted_tokens(ids_BL, self.source_length)

    @property
    def sequences(self) -> Tensor:
        """All of them in the order of their numbers, ``[N + M, L]`` int64: the held-out ones come last."""
        return torch.cat([self.train_NL, self.held_out_ML])

    def record(self) -> RecoveryData:
        """The text as reports describe it."""
        sequences, length = self.train_NL.shape
        record: RecoveryData = {
            "dataset": dataset_name(self.plan.dataset),
            "dataset_sha256": dataset_digest(self.plan.dataset),
            "text_column": self.plan.text_column,
            "sequences": sequences,
            "sequence_length": length,
            "tokens": sequences * length,
            "held_out_tokens": self.held_out_ML.numel(),
            "sha256": fingerprint(self.sequences),
            "domains": list(self.domains),
        }
        if self.source_length:
            record["source_length"] = self.source_length
            record["is_split"] = self.plan.is_split
            record["sides"] = "ids" if self.plan.is_token_ids else "pairs" if self.are_pairs else "spans"
        return record


def plan_text(model: SourceModel, options: RecoverOptions) -> CalibrationPlan:
    """Plans the text without reading it.

    Raises:
        PlanError: If a tokenizer is missing, the sequences are longer than the model accepts, or the text is one that
            only a conversion can have.
        CalibrationError: If a file does not exist or its type is unknown, or shares are not valid.
    """
    limit = getattr(model.skeleton.text_config, "max_position_embeddings", None)
    has_encoder = model.skeleton.is_encoder_decoder
    length = options.sequence_length or (
        default_length(limit, is_encoder_decoder=True) if has_encoder else min(DEFAULT_LENGTH, limit or DEFAULT_LENGTH)
    )
    wanted = CalibrationOptions(
        dataset=options.data,
        samples=options.samples or _default_samples(options, length),
        sequence_length=length,
        source_length=options.source_length,
        seed=options.seed,
        text_column=options.text_column,
    )
    try:
        _refuse_self(options)
        plan = plan_calibration(
            wanted,
            max_positions=limit,
            has_tokenizer=has_tokenizer(model.source.files()),
            label=model.source.label,
            fits=False,
            is_encoder_decoder=has_encoder,
        )
    except HcsmoeError as error:
        raise _in_own_words(error) from None
    if plan.sequence_length < 2:
        raise PlanError(
            f"sequences of {plan.sequence_length} token predict nothing.", hint="use `sequence_length=2` or more"
        )
    return replace(plan, measures=False, held_out=options.held_out)


def read_text(model: SourceModel, options: RecoverOptions, plan: CalibrationPlan, emit: Listener) -> RecoveryText:
    """Reads the text, and splits it by documents.

    Args:
        model: The result, whose tokenizer it is.
        options: Of the recovery.
        plan: From ``plan_text``.
        emit: Called with warnings.

    Raises:
        CalibrationError: If it is too short for one step, or none of it can be held out.
    """
    source = model.source
    for file in sidecar_files(source.files(), lambda name: source.fetch(name).read_text("utf-8-sig", "replace")):
        source.fetch(file)
    try:
        loaded = load_calibration(
            plan,
            tokenizer_folder=source.fetch("config.json").parent,
            vocab_size=model.skeleton.text_config.vocab_size,
            emit=emit,
        )
    except HcsmoeError as error:
        raise _in_own_words(error) from None
    if plan.is_token_ids:
        loaded = _split_rows(loaded, options.held_out)
    _check_size(loaded, options)
    loaded = _with_scored(loaded)
    return RecoveryText(
        plan=plan,
        train_NL=loaded.token_ids,
        held_out_ML=loaded.measured_ids,
        domains=domain_records(loaded),
        source_length=loaded.source_length,
        are_pairs=loaded.are_pairs,
    )


def step_sequences(options: RecoverOptions) -> int:
    """Sequences of one step, of all processes together."""
    return options.batch_size * options.gradient_accumulation * ranks.size()


def _refuse_self(options: RecoverOptions) -> None:
    if any(source.location == SELF for source in parse_sources(options.data)):
        raise PlanError(
            f"`data='{options.data}'` has text that the source model writes, which only a conversion can have.",
            hint="pass a file, a folder or a dataset with `data`",
        )


def _default_samples(options: RecoverOptions, length: int) -> int:
    if options.max_steps is None or options.max_minutes is not None:
        return max(1, DEFAULT_TOKENS // length)
    wanted = math.ceil(options.max_steps * step_sequences(options) / (1 - options.held_out)) + 1
    # However short the training is, its held-out text has something of every domain.
    return max(wanted, LEAST_TOKENS // length)


def _split_rows(loaded: CalibrationSet, share: float) -> CalibrationSet:
    """Holds the last rows of a file of token ids out: each is taken for a document."""
    count = len(loaded.token_ids)
    held = min(count - 1, max(1, int(count * share)))
    return replace(
        loaded,
        token_ids=loaded.token_ids[: count - held],
        domains=loaded.domains[: count - held],
        measured_ids=loaded.token_ids[count - held :],
        measured_domains=loaded.domains[count - held :],
    )


def _with_scored(loaded: CalibrationSet) -> CalibrationSet:
    """The same with evenly spaced held-out sequences, as many as are scored."""
    found, length = loaded.measured_ids.shape
    count = min(found, max(1, SCORED_TOKENS // length))
    numbers = torch.linspace(0, found - 1, count).round().long()
    domains = tuple(loaded.measured_domains[number] for number in numbers.tolist())
    return replace(loaded, measured_ids=loaded.measured_ids[numbers], measured_domains=domains)


def _check_size(loaded: CalibrationSet, options: RecoverOptions) -> None:
    found, wanted = len(loaded.token_ids), step_sequences(options)
    length = loaded.token_ids.shape[1]
    if not len(loaded.measured_ids):
        raise CalibrationError(
            f"the text of {options.data} fills {found} sequences of {length} tokens, none of which could be held out "
            "without cutting a document in two.",
            hint="pass more documents with `data`, or use a shorter `sequence_length`",
        )
    if found < wanted:
        raise CalibrationError(
            f"the text of {options.data} fills {found} sequences of {length} tokens to train on, fewer than the "
            f"{wanted} of one step.",
            hint="pass more text, or use a smaller `batch_size` or a shorter `sequence_length`",
        )


def _in_own_words(error: HcsmoeError) -> HcsmoeError:
    """A refusal of calibration text, whose option has another name here."""
    message, hint = (text.replace("`dataset", "`data") for text in (error.message, error.hint))
    return type(error)(message, hint=hint, option="data" if error.option == "dataset" else error.option)
