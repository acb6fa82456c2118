"""Floating-point operations that the refits of one layer take, for estimates and benchmarks."""

from dataclasses import dataclass

from hcsmoe_hub.methods.refit.down_projections import DOWN_ROUNDS
from hcsmoe_hub.methods.refit.experts import ROUNDS, STEP_TOKENS
from hcsmoe_hub.methods.refit.input_matrices import ITERATIONS

# Adam steps that refit a whole block, and calibration tokens of each.
BLOCK_STEPS = 400
BLOCK_STEP_TOKENS = 4096


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

    def down(self, rounds: int = DOWN_ROUNDS) -> float:
        """Features, Gram matrices and factors once; products and residuals once per round."""
        routed = 2.0 * self.tokens * self.top_k * self.neurons
        once = routed * (self.matrices * self.hidden + self.neurons) + self.experts * self.neurons**3 / 3
        return once + rounds * 2 * (routed + self.experts * self.neurons**2) * self.hidden

    def whole(self) -> float:
        """One exact solve, then rounds of steps on a sample of the tokens and one pass over the down projections."""
        passed = self.trained(min(self.tokens, STEP_TOKENS)) / 3
        step = passed * (2 + 2 * ITERATIONS + 2)
        return self.down() + ROUNDS * (step + self.down(rounds=1))

    def trained(self, tokens: int) -> float:
        """Forward and backward pass of the experts over some tokens."""
        return 3 * 2.0 * tokens * self.top_k * self.matrices * self.neurons * self.hidden
