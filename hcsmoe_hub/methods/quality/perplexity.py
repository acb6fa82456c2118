"""Perplexity of a text. S positions, V vocabulary."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from hcsmoe_hub.methods.quality.tally import DomainTally, by_domain

# The greatest mean loss whose perplexity a float holds.
GREATEST_LOSS = 700.0


def token_losses(logits_SV: Tensor, targets_S: Tensor) -> Tensor:
    """Negative log-likelihood of each target in nats, ``[S]`` float64."""
    return F.cross_entropy(logits_SV.float(), targets_S, reduction="none").double()


@dataclass(slots=True)
class Perplexity:
    """``exp(sum of negative log-likelihoods / number of tokens)``, overall and per domain."""

    losses: DomainTally = field(default_factory=DomainTally)

    def add(self, domain: str | None, logits_SV: Tensor, targets_S: Tensor) -> None:
        """Adds the predictions of one window."""
        self.losses.add(domain, token_losses(logits_SV, targets_S).sum(), len(targets_S))

    def figures(self) -> dict[str, Any]:
        """``{"overall": {"perplexity", "nll", "tokens"}, "domains": {...}}``; nll in nats per token."""
        table = by_domain(nll=self.losses)

        def row(found: dict[str, Any]) -> dict[str, Any]:
            return {"perplexity": math.exp(found["nll"]), "nll": found["nll"], "tokens": found["count"]}

        domains = {domain: row(found) for domain, found in table["domains"].items()}
        return {"overall": row(table["overall"]), "domains": domains}
