"""What is observed of a layer's experts on calibration text: the real routing, and every expert on every token.

E experts, T tokens of one micro-batch, N tokens routed to one expert, H hidden size, I expert intermediate size, F
feature size (hidden activation or output), K experts per token.
"""

import torch
from torch import Tensor

from hcsmoe_hub.model.experts import Experts
from hcsmoe_hub.observation.observers import RoutedObserver, hidden_of, padded
from hcsmoe_hub.observation.statistics import ExpertStatistics
from hcsmoe_hub.observation.visits import GroupedRun


class CalibrationObserver(RoutedObserver):
    """Also accumulates what clustering, merging and pruning need.

    Args:
        statistics: Where it is accumulated.
    """

    def __init__(self, statistics: ExpertStatistics) -> None:
        super().__init__()
        self.statistics = statistics
        self._scales_input = False
        # What every choice of the micro-batch at work adds to the output, if products of them are wanted.
        self._routed_TKH: Tensor | None = None

    def __call__(self, experts: Experts, tokens_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        self._scales_input = experts.scales_input
        output_TH = super().__call__(experts, tokens_TH, index_TK, weight_TK)
        self.statistics.count(self.top_k[-1].to(tokens_TH.device))
        return output_TH

    def _grouped(self, run: GroupedRun, experts: Experts, tokens_TH: Tensor) -> Tensor:
        statistics, routed_TKH = self.statistics, run.routed()
        norm_TK = routed_TKH.norm(dim=-1)
        own_norm_TK = norm_TK if experts.scales_input else norm_TK / run.weight_TK.abs()
        statistics.add_choices(run.chosen_TK, run.weight_TK, norm_TK, own_norm_TK)
        if statistics.wanted.products:
            statistics.add_products(run.chosen_TK, routed_TKH)
        output_TH = routed_TKH.sum(1)
        del routed_TKH
        if statistics.wanted.outputs:
            for expert, (own_RF, others) in enumerate(run.features()):
                if experts.scales_input:
                    # A weight on the input makes the routed runs useless for a mean over unweighted tokens.
                    statistics.add_features(expert, self._features(experts, expert, tokens_TH))
                    continue
                statistics.add_features(expert, own_RF)
                statistics.add_features(expert, self._features(experts, expert, tokens_TH[others]))
        return output_TH

    def _one_by_one(self, experts: Experts, tokens_TH: Tensor, chosen_TK: Tensor, weight_TK: Tensor) -> Tensor:
        if not self.statistics.wanted.products:
            return super()._one_by_one(experts, tokens_TH, chosen_TK, weight_TK)
        shape = (*chosen_TK.shape, tokens_TH.shape[-1])
        self._routed_TKH = torch.zeros(shape, dtype=torch.float32, device=tokens_TH.device)
        output_TH = super()._one_by_one(experts, tokens_TH, chosen_TK, weight_TK)
        self.statistics.add_products(chosen_TK, self._routed_TKH)
        self._routed_TKH = None
        return output_TH

    def _on_run(self, experts: Experts, expert: int, hidden_NI: Tensor, output_NH: Tensor) -> None:
        if self.statistics.wanted.outputs:
            self.statistics.add_features(expert, hidden_NI if experts.is_affine else output_NH)

    def _on_expert(self, experts: Experts, expert: int, tokens_TH: Tensor, token: Tensor) -> None:
        if not self.statistics.wanted.outputs:
            return
        # A weight on the input makes the routed runs useless for a mean over unweighted tokens.
        rest = torch.ones(len(tokens_TH), dtype=torch.bool, device=tokens_TH.device)
        if not experts.scales_input:
            rest[token] = False
        others = torch.where(rest)[0]
        if len(others):
            features = self._features(experts, expert, tokens_TH[padded(others)])
            self.statistics.add_features(expert, features[: len(others)])

    @staticmethod
    def _features(experts: Experts, expert: int, tokens_TH: Tensor) -> Tensor:
        """What of an expert is averaged over tokens, ``[T, F]``."""
        hidden_TI = hidden_of(experts, expert, tokens_TH)
        return hidden_TI if experts.is_affine else experts.project(expert, hidden_TI)

    def _on_routed(self, expert: int, token: Tensor, slot: Tensor, routed_NH: Tensor, weight_N1: Tensor) -> None:
        norm_N, weight_N = routed_NH.norm(dim=-1), weight_N1[:, 0]
        self.statistics.add_norms(expert, norm_N)
        if self.statistics.wanted.sums:
            # Only a weight on the output can be taken back.
            own_norm_N = norm_N if self._scales_input else norm_N / weight_N.abs()
            self.statistics.add_weights(expert, weight_N, own_norm_N)
        if self._routed_TKH is not None:
            self._routed_TKH[token, slot] = routed_NH


def mean_outputs(experts: Experts, statistics: ExpertStatistics) -> Tensor:
    """Mean output of every expert over all calibration tokens.

    ``o_i = (1/T) sum_x E_i(x)`` (HC-SMoE, eq. 4), unweighted and over all tokens, whether routed there or not. Where
    the output is affine in the hidden activation, the mean activation is projected once, which is exact.

    Returns:
        ``[E, H]`` float32 on the CPU.
    """
    mean_EF = statistics.mean_features()
    if not experts.is_affine:
        return mean_EF.float().cpu()
    rows = [experts.project(expert, mean_EF[expert, None].float()) for expert in range(experts.num_experts)]
    return torch.cat(rows).cpu()
