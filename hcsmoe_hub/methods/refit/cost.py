"""Floating-point operations that the refits of one layer take, for estimates and benchmarks."""

from dataclasses import dataclass

from hcsmoe_hub.methods.refit.down_projections import DOWN_ROUNDS
from hcsmoe_hub.methods.refit.guard import JUDGED_TOKENS
from hcsmoe_hub.methods.refit.held_out import HELD_OUT_SHARE

# How often a descent is judged: before it, after parts of it, and on a part of the way back.
JUDGED_TIMES = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedLayer:
    """Sizes of a layer that is fitted.

    Attributes:
        hidden: Hidden size.
        neurons: Neurons of one expert.
        experts: Experts that are left.
        top_k: Active experts per token.
        tokens: Calibration tokens.
        matrices: Vectors of one neuron: gate, up and down, or up and down only.
    """

    hidden: int
    neurons: int
    experts: int
    top_k: int
    tokens: int
    matrices: int = 3

    @property
    def parameters(self) -> int:
        """Parameters of its experts."""
        return self.experts * self.matrices * self.neurons * self.hidden

    def down(self, rounds: int = DOWN_ROUNDS) -> float:
        """Features, Gram matrices and factors once; products and residuals once per round."""
        routed = 2.0 * self.tokens * self.top_k * self.neurons
        once = routed * (self.matrices * self.hidden + self.neurons) + self.experts * self.neurons**3 / 3
        return once + rounds * 2 * (routed + self.experts * self.neurons**2) * self.hidden

    def block(self, passes: int = 1) -> float:
        """Forward and backward passes over the fitted tokens, and forward passes over those that judge them."""
        held_out = self.tokens // HELD_OUT_SHARE
        judged = JUDGED_TIMES * min(JUDGED_TOKENS, held_out)
        return (3 * passes * (self.tokens - held_out) + judged) * self._forward()

    def _forward(self) -> float:
        """One token through its experts and the router."""
        experts = self.top_k * self.matrices * self.neurons * self.hidden
        return 2.0 * (experts + self.experts * self.hidden)
