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
        calibration: Its calibration set; ``None`` where statistics of an earlier run take its place.
    """
    if not plan.options.measure:
        return "it was switched off"
    if calibration is None:
        return "calibration statistics were reused, so the model did not run"
    if not len(calibration.measured_ids):
        if plan.calibration.is_token_ids:
            return "all token ids were used for calibration"
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
        before, after, agreement = Perplexity(), Perplexity(), Agreement(dtype=torch.float32)
        last: Any = self.skeleton.module.get_output_embeddings()
        last.to(self.device)
        size = logit_tokens(last.weight.shape[0])
        with torch.no_grad():
            for number, domain in enumerate(self.domains):
                for start in range(0, self.ids_MS.shape[1] - 1, size):
                    # The last token has no next one.
                    rows = slice(start, min(start + size, self.ids_MS.shape[1] - 1))
                    targets_S = self.ids_MS[number, rows.start + 1 : rows.stop + 1].to(self.device)
                    source_SV = head(self.skeleton, self.source_MSH[number, rows])
                    result_SV = head(self.skeleton, self.result_MSH[number, rows])
                    before.add(domain or None, source_SV, targets_S)
                    after.add(domain or None, result_SV, targets_S)
                    agreement.add(domain or None, result_SV, source_SV)
                advance()
        losses = [perplexity.losses.overall.mean for perplexity in (before, after)]
        if not all(isfinite(loss) and loss < _GREATEST_LOSS for loss in losses):
            return None
        return self._described(before.figures(), after.figures(), agreement.figures())

    def _described(self, before: dict[str, Any], after: dict[str, Any], agreement: dict[str, Any]) -> Measured:
        sequences, length = self.ids_MS.shape
        domains = {
            domain: _row(before["domains"][domain], row, agreement["domains"][domain])
            for domain, row in after["domains"].items()
        }
        return {
            "sequences": sequences,
            "sequence_length": length,
            "sha256": fingerprint(self.ids_MS),
            "overall": _row(before["overall"], after["overall"], agreement["overall"]),
            "domains": domains,
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
