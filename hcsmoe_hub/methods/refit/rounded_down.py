"""Down projections that are rounded piece by piece, each piece making up for the rounding of those before it.

C experts, T tokens, I neurons of an expert, H hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from hcsmoe_hub.methods.refit.down_projections import RoutedNeurons, fit_down, routed_output


@dataclass(frozen=True, slots=True, eq=False)
class _SomeNeurons:
    """The same experts with some of their neurons only."""

    sample: RoutedNeurons
    neurons: slice

    @property
    def tokens_TH(self) -> Tensor:
        return self.sample.tokens_TH

    @property
    def index_TK(self) -> Tensor:
        return self.sample.index_TK

    @property
    def weight_TK(self) -> Tensor:
        return self.sample.weight_TK

    def hidden(self, expert: int, inputs_RH: Tensor) -> Tensor:
        return self.sample.hidden(expert, inputs_RH)[:, self.neurons]


def fit_rounded_down(
    sample: RoutedNeurons,
    wanted_TH: Tensor,
    down_CIH: Tensor,
    *,
    round_down: Callable[[Tensor], Tensor],
    piece: int,
    kept_bytes: int | None = None,
) -> None:
    """Fits the down projections, in place, to what is left after rounding: their own, and that of all else.

    Piece by piece, some rows of every expert are rounded, and the rest are fitted again by least squares.

    Args:
        sample: Inputs, choices and weights of the merged experts on the tokens to fit.
        wanted_TH: What the experts should add up to without biases of the down projections, float32.
        down_CIH: The projections, float32; written to.
        round_down: Rounds projections ``[C, I, H]``; rounds those that it made to themselves, row by row.
        piece: Neurons of every expert that are rounded at once; scales do not reach beyond them.
        kept_bytes: Memory for what a fit keeps; see ``fit_down``.
    """
    down_CIH.copy_(fit_down(sample, wanted_TH, down_CIH, kept_bytes=kept_bytes))
    for start in range(0, down_CIH.shape[1], piece):
        done, rest = slice(0, start + piece), slice(start + piece, None)
        down_CIH[:, done] = round_down(down_CIH)[:, done]
        if down_CIH[:, rest].numel():
            missing_TH = wanted_TH - routed_output(_SomeNeurons(sample, done), down_CIH[:, done])
            some = _SomeNeurons(sample, rest)
            down_CIH[:, rest] = fit_down(some, missing_TH, down_CIH[:, rest], kept_bytes=kept_bytes)
