"""Agreement of a model's predictions with those of its base. S positions, V vocabulary."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hcsmoe_hub.methods.quality.tally import DomainTally, by_domain


def divergence(logits_SV: Tensor, base_logits_SV: Tensor, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """Kullback-Leibler divergence of the model from its base, ``sum_v p_base(v) * log(p_base(v) / p_model(v))``.

    Args:
        logits_SV: Logits of the model, ``[S, V]``.
        base_logits_SV: Logits of the base, ``[S, V]``.
        dtype: Dtype to compute in: a model close to its base differs by less than float32 resolves, which costs a third
            of the time.

    Returns:
        ``[S]`` float64, in nats.
    """
    log_probs_SV, base_log_probs_SV = (
        F.log_softmax(logits, dim=-1, dtype=dtype) for logits in (logits_SV, base_logits_SV)
    )
    return F.kl_div(log_probs_SV, base_log_probs_SV, reduction="none", log_target=True).sum(-1).double()


@dataclass(slots=True)
class Agreement:
    """KL(base || model) over the whole vocabulary, and how often both predict the same most likely token.

    Attributes:
        dtype: Dtype that divergences are computed in.
        divergences: The divergences.
        matches: Which tokens both predict.
    """

    dtype: torch.dtype = torch.float64
    divergences: DomainTally = field(default_factory=DomainTally)
    matches: DomainTally = field(default_factory=DomainTally)

    def add(self, domain: str | None, logits_SV: Tensor, base_logits_SV: Tensor) -> None:
        """Adds both predictions for one window."""
        same_S = logits_SV.argmax(-1) == base_logits_SV.argmax(-1)
        self.divergences.add(domain, divergence(logits_SV, base_logits_SV, dtype=self.dtype).sum(), len(same_S))
        self.matches.add(domain, same_S.sum().double(), len(same_S))

    def figures(self) -> dict[str, Any]:
        """``{"overall": {"kl", "top1_agreement", "tokens"}, "domains": {...}}``; kl in nats per token, share 0 to 1."""
        table = by_domain(kl=self.divergences, top1_agreement=self.matches)
        for row in (table["overall"], *table["domains"].values()):
            row["tokens"] = row.pop("count")
        return table
