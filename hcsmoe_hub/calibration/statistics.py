"""Streaming statistics of one layer's experts: independent of how the tokens were cut into micro-batches.

E experts, T tokens of one micro-batch, F feature size (hidden activation or output), K experts per token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class ExpertStatistics:
    """Sums over all calibration tokens seen so far.

    Attributes:
        features_EF: Sum over all tokens of each expert's feature vector, float64, on the device of the features.
        usage_E: How often the router chose each expert, int64.
        saliency_E: Sum over routed tokens of ``weight * ||E_i(x)||``, float64 (REAP's numerator).
        tokens: Number of tokens seen.
    """

    features_EF: Tensor
    usage_E: Tensor
    saliency_E: Tensor
    tokens: int = 0

    @classmethod
    def empty(cls, experts: int) -> "ExpertStatistics":
        """Statistics before the first token; the feature size is known with the first features."""
        return cls(
            features_EF=torch.zeros(experts, 0, dtype=torch.float64),
            usage_E=torch.zeros(experts, dtype=torch.int64),
            saliency_E=torch.zeros(experts, dtype=torch.float64),
        )

    def count(self, top_k_TK: Tensor) -> None:
        """Counts the router's choices of one micro-batch; -1 is no choice."""
        self.tokens += len(top_k_TK)
        chosen = top_k_TK[top_k_TK >= 0].long()
        self.usage_E += torch.bincount(chosen, minlength=len(self.usage_E))

    def add_features(self, expert: int, features_TF: Tensor) -> None:
        """Adds one expert's features of one micro-batch, summed in float32 and accumulated in float64."""
        if self.features_EF.shape[1] == 0:
            shape = (len(self.usage_E), features_TF.shape[1])
            self.features_EF = torch.zeros(shape, dtype=torch.float64, device=features_TF.device)
        self.features_EF[expert] += features_TF.sum(0, dtype=torch.float32)

    def add_saliency(self, expert: int, routed_NH: Tensor) -> None:
        """Adds the norms of one expert's router-weighted outputs ``[N, H]``."""
        self.saliency_E[expert] += routed_NH.norm(dim=-1).sum(dtype=torch.float64).cpu()

    def mean_features(self) -> Tensor:
        """Mean feature of every expert over all tokens, ``[E, F]`` float64."""
        return self.features_EF / self.tokens

    def saliency(self) -> Tensor:
        """Mean over the tokens routed to an expert of ``weight * ||E_i(x)||``, ``[E]`` float64; 0 where none was."""
        return self.saliency_E / self.usage_E.clamp(min=1)
