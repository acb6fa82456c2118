"""What a conversion cost: the predictions of the source and of the result on text that neither of them was fitted to.

M held-out sequences of S tokens, H hidden size, V vocabulary. Of a model with an encoder, hidden states are those of
its decoder, which are fewer than S.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from hcsmoe_hub.calibration.calibration_set import CalibrationSet
from hcsmoe_hub.calibration.token_ids import fingerprint
from hcsmoe_hub.machine import ranks
from hcsmoe_hub.methods.quality.agreement import Agreement
from hcsmoe_hub.methods.quality.perplexity import GREATEST_LOSS, Perplexity
from hcsmoe_hub.methods.quality.tally import DomainTally
from hcsmoe_hub.model.head import head
from hcsmoe_hub.model.sequences import predicted_tokens
from hcsmoe_hub.model.skeleton import Skeleton
from hcsmoe_hub.pipeline.sharding import all_sequences
from hcsmoe_hub.planning.conversion_plan import ConversionPlan
from hcsmoe_hub.planning.memory_use import logit_tokens
from hcsmoe_hub.report import Measured, MeasuredRow

NOT_FINITE = "the predictions of the source or of the result are not finite numbers"


def why_not_measured(plan: ConversionPlan, calibration: CalibrationSet | None) -> str | None:
    """Why a conversion does not measure what it cost; ``None`` if it does.

    Args:
        plan: The conversion.
        calibration: Its calibration set; ``None`` where a statistics file has none.
    """
    if not plan.options.measure:
        return "it was switched off"
    if calibration is None:
        return "the statistics file is of an earlier version, which kept no text"
    if not len(calibration.measured_ids):
        if plan.calibration.is_token_ids:
            return "all token ids were used for calibration"
        if not plan.calibration.measures:
            return "the statistics were collected without text to measure on"
        return "the calibration text is too short to hold any of it out"
    if not predicted_tokens(calibration.measured_ids, plan.calibration.source_length).shape[1]:
        return "sequences of one token predict nothing"
    return None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeldOut:
    """Held-out sequences of this rank after their way through both models.

    Attributes:
        skeleton: The source, its head in memory; the result has the same.
        device: Where the head is to run.
        ids_MS: Token ids, ``[M, S]`` int64.
        domains: Domain of each sequence.
        source_MSH: Hidden states after the last norm of the source.
        result_MSH: The same of the result.
        source_length: Tokens of each sequence that went into an encoder; 0 for a decoder-only model.
    """

    skeleton: Skeleton
    device: torch.device
    ids_MS: Tensor
    domains: Sequence[str]
    source_MSH: Tensor
    result_MSH: Tensor
    source_length: int = 0

    def measure(self, advance: Callable[[], None]) -> Measured | None:
        """Compares the predictions of both models: of every token but the first, or of the labels of a decoder.

        Args:
            advance: Called after each sequence.

        Returns:
            The figures; ``None`` if they are not finite.
        """
        return measure_results(self, [self.result_MSH], advance)[0]


def measure_results(
    held_out: HeldOut, results_MSH: Sequence[Tensor], advance: Callable[[], None]
) -> list[Measured | None]:
    """Compares the predictions of several results with those of their source, which are computed once.

    Args:
        held_out: The sequences, on each rank its own; its own result is not looked at.
        results_MSH: Hidden states after the last norm of every result.
        advance: Called after each sequence.

    Returns:
        The figures of every result over the sequences of all ranks; ``None`` if they are not finite.
    """
    before, after = Perplexity(), [Perplexity() for _ in results_MSH]
    agreement = [Agreement(dtype=torch.float32) for _ in results_MSH]
    skeleton, ids_MS = held_out.skeleton, held_out.ids_MS
    labels_MS = predicted_tokens(ids_MS, held_out.source_length)
    last: Any = skeleton.module.get_output_embeddings()
    last.to(held_out.device)
    size = logit_tokens(last.weight.shape[0])
    with torch.no_grad():
        for number, domain in enumerate(held_out.domains):
            for start in range(0, labels_MS.shape[1], size):
                # The last position of a decoder-only model has no label.
                rows = slice(start, min(start + size, labels_MS.shape[1]))
                targets_S = labels_MS[number, rows].to(held_out.device)
                source_SV = head(skeleton, held_out.source_MSH[number, rows])
                before.add(domain or None, source_SV, targets_S)
                for place, result_MSH in enumerate(results_MSH):
                    result_SV = head(skeleton, result_MSH[number, rows])
                    after[place].add(domain or None, result_SV, targets_S)
                    agreement[place].add(domain or None, result_SV, source_SV)
            advance()
    ids_MS = all_sequences(ids_MS)
    before, *after = (_perplexity_of_all(own) for own in (before, *after))
    agreement = [_agreement_of_all(own) for own in agreement]
    source_length = held_out.source_length
    return [_described(ids_MS, source_length, before, *found) for found in zip(after, agreement, strict=True)]


def _perplexity_of_all(own: Perplexity) -> Perplexity:
    """What all ranks have added up, each over sequences of its own."""
    return Perplexity(losses=_tally_of_all(own.losses))


def _agreement_of_all(own: Agreement) -> Agreement:
    return Agreement(dtype=own.dtype, divergences=_tally_of_all(own.divergences), matches=_tally_of_all(own.matches))


def _tally_of_all(own: DomainTally) -> DomainTally:
    return DomainTally.sum_of(ranks.every(DomainTally.sum_of([own])))


def _described(
    ids_MS: Tensor, source_length: int, before: Perplexity, after: Perplexity, agreement: Agreement
) -> Measured | None:
    losses = [perplexity.losses.overall.mean for perplexity in (before, after)]
    if not all(isfinite(loss) and loss < GREATEST_LOSS for loss in losses):
        return None
    sequences, length = ids_MS.shape
    tables = before.figures(), after.figures(), agreement.figures()
    found: Measured = {
        "sequences": sequences,
        "sequence_length": length,
        "sha256": fingerprint(ids_MS),
        "overall": _row(*(table["overall"] for table in tables)),
        "domains": {domain: _row(*(table["domains"][domain] for table in tables)) for domain in tables[1]["domains"]},
    }
    if source_length:
        found["source_length"] = source_length
    return found


def _row(before: dict[str, Any], after: dict[str, Any], agreement: dict[str, Any]) -> MeasuredRow:
    return {
        "tokens": after["tokens"],
        "perplexity_before": before["perplexity"],
        "perplexity_after": after["perplexity"],
        "ratio": after["perplexity"] / before["perplexity"],
        "kl": agreement["kl"],
        "top1_agreement": agreement["top1_agreement"],
    }
