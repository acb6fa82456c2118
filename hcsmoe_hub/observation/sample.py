"""Hidden activations of a layer's experts on a sample of its tokens.

T tokens, K experts per token, H hidden size, I expert intermediate size, R inputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hcsmoe_hub.model.experts import Experts


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NeuronSample:
    """Tokens of one MoE layer, and where its router sends them.

    Attributes:
        experts: The source's experts.
        tokens_TH: What goes into the experts, in the dtype and on the device of their weights.
        index_TK: Experts that the router chose; -1 for none.
        weight_TK: Router weights of the choices.
    """

    experts: Experts
    tokens_TH: Tensor
    index_TK: Tensor
    weight_TK: Tensor

    def part(self, tokens: Tensor | slice) -> "NeuronSample":
        """The same for some of the tokens."""
        return replace(
            self,
            tokens_TH=self.tokens_TH[tokens],
            index_TK=self.index_TK[tokens],
            weight_TK=self.weight_TK[tokens],
        )

    def all_inputs(self) -> Tensor:
        """Every token, wherever it is routed, not scaled by any router weight; ``[T, H]``."""
        return self.tokens_TH

    def routed_inputs(self, members: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Inputs of some experts: the tokens routed to any of them.

        Returns:
            Inputs ``[R, H]``, and float64 ``[R]`` how many of the members each one goes to. Where the router weight
            scales the input, a token that goes to two members is two inputs.
        """
        device = self.tokens_TH.device
        index_TK = self.index_TK.to(device)
        chosen_TK = torch.isin(index_TK, torch.tensor(members, dtype=index_TK.dtype, device=device))
        if self.experts.scales_input:
            token, slot = torch.where(chosen_TK)
            weight_R1 = self.weight_TK.to(device)[token, slot, None].to(self.tokens_TH.dtype)
            return self.tokens_TH[token] * weight_R1, torch.ones(len(token), dtype=torch.float64, device=device)
        count_T = chosen_TK.sum(1, dtype=torch.float64)
        return self.tokens_TH[count_T > 0], count_T[count_T > 0]

    def hidden(self, expert: int, inputs_RH: Tensor) -> Tensor:
        """Hidden activation of one expert on some inputs: ``[R, I]`` float32."""
        with torch.no_grad():
            return self.experts.hidden(expert, inputs_RH).float()
