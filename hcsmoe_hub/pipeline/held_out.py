"""What a conversion cost: the predictions of the source and of the result on text that neither of them was fitted to.

M held-out sequences of S tokens, H hidden size, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from hcsmoe_hub.calibration.calibration_set import CalibrationSet
from hcsmoe_hub.calibration.token_ids import fingerprint
from hcsmoe_hub.methods.quality.agreement import Agreement
from hcsmoe_hub.methods.quality.perplexity import Perplexity
from hcsmoe_hub.model.head import head
from hcsmoe_hub.model.skeleton import Skeleton
from hcsmoe_hub.planning.conversion_plan import ConversionPlan
from hcsmoe_hub.planning.estimate import logit_tokens
from hcsmoe_hub.report import Measured, MeasuredRow

# The greatest mean loss whose perplexity a float holds.
_GREATEST_LOSS = 700.0
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
    if calibration.measured_ids.shape[1] < 2:
        return "sequences of one token predict nothing"
    return None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeldOut:
    """Held-out sequences after their way through both models.

    Attributes:
        skeleton: The source, its head in memory; the result has the same.
        device: Where the head is to run.
        ids_MS: Token ids, ``[M, S]`` int64.
        domains: Domain of each sequence.
        source_MSH: Hidden states after the last norm of the source.
        result_MSH: The same of the result.
    """

    skeleton: Skeleton
    device: torch.device
    ids_MS: Tensor
    domains: Sequence[str]
    source_MSH: Tensor
    result_MSH: Tensor

    def measure(self, advance: Callable[[], None]) -> Measured | None:
        """Compares the predictions of both models for every token but the first of a sequence.

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
        held_out: The sequences; its own result is not looked at.
        results_MSH: Hidden states after the last norm of every result.
        advance: Called after each sequence.

    Returns:
        The figures of every result; ``None`` if they are not finite.
    """
    before, after = Perplexity(), [Perplexity() for _ in results_MSH]
    agreement = [Agreement(dtype=torch.float32) for _ in results_MSH]
    skeleton, ids_MS = held_out.skeleton, held_out.ids_MS
    last: Any = skeleton.module.get_output_embeddings()
    last.to(held_out.device)
    size = logit_tokens(last.weight.shape[0])
    with torch.no_grad():
        for number, domain in enumerate(held_out.domains):
            for start in range(0, ids_MS.shape[1] - 1, size):
                # The last token has no next one.
                rows = slice(start, min(start + size, ids_MS.shape[1] - 1))
                targets_S = ids_MS[number, rows.start + 1 : rows.stop + 1].to(held_out.device)
                source_SV = head(skeleton, held_out.source_MSH[number, rows])
                before.add(domain or None, source_SV, targets_S)
                for place, result_MSH in enumerate(results_MSH):
                    result_SV = head(skeleton, result_MSH[number, rows])
                    after[place].add(domain or None, result_SV, targets_S)
                    agreement[place].add(domain or None, result_SV, source_SV)
            advance()
    return [_described(ids_MS, before, *found) for found in zip(after, agreement, strict=True)]


def _described(ids_MS: Tensor, before: Perplexity, after: Perplexity, agreement: Agreement) -> Measured | None:
    losses = [perplexity.losses.overall.mean for perplexity in (before, after)]
    if not all(isfinite(loss) and loss < _GREATEST_LOSS for loss in losses):
        return None
    sequences, length = ids_MS.shape
    tables = before.figures(), after.figures(), agreement.figures()
    return {
        "sequences": sequences,
        "sequence_length": length,
        "sha256": fingerprint(ids_MS),
        "overall": _row(*(table["overall"] for table in tables)),
        "domains": {domain: _row(*(table["domains"][domain] for table in tables)) for domain in tables[1]["domains"]},
    }


def _row(before: dict[str, Any], after: dict[str, Any], agreement: dict[str, Any]) -> MeasuredRow:
    return {
        "tokens": after["tokens"],
        "perplexity_before": before["perplexity"],
        "perplexity_after": after["perplexity"],
        "ratio": after["perplexity"] / before["perplexity"],
        "kl": agreement["kl"],
        "top1_agreement": agreement["top1_agreement"],
    }
