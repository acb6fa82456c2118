"""What a layer loses with a set of its experts, read off the products of their router-weighted outputs.

``G_ij = sum_t g_i(t) g_j(t) <E_i(x_t), E_j(x_t)>`` holds all that a quadratic loss of the routed output
``sum_i g_i E_i`` can depend on. S is the set of kept experts, P that of dropped ones, p its indicator.

E experts, K of them kept, B subsets.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

# Keeps the equations solvable where an expert adds nothing that the others do not; a share of the mean energy.
RIDGE = 1e-9
# Subsets whose equations are solved at once.
SOLVED = 1024

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]


@dataclass(frozen=True)
class SubsetLoss(ABC):
    """A loss of subsets of experts that knows what one more, one fewer, or an exchange would change.

    Attributes:
        gram_EE: G, ``[E, E]`` float64.
    """

    gram_EE: Floats

    @property
    def experts(self) -> int:
        """E."""
        return len(self.gram_EE)

    @abstractmethod
    def of(self, kept_BK: Indices) -> Floats:
        """Loss of keeping some experts, for B subsets of the same size."""

    @abstractmethod
    def without(self, kept_E: NDArray[np.bool_]) -> Floats:
        """Loss after one more expert is dropped, ``[E]``; infinite for experts that are not kept."""

    @abstractmethod
    def with_one(self, kept_E: NDArray[np.bool_]) -> Floats:
        """Loss after one more expert is kept, ``[E]``; infinite for those that are."""

    @abstractmethod
    def exchanged(self, kept_E: NDArray[np.bool_]) -> Floats:
        """Loss after the expert of a row gave way to the one of a column, ``[E, E]``; infinite where none can."""


def _only(changes: Floats, allowed: NDArray[np.bool_]) -> Floats:
    return np.where(allowed, changes, np.inf)


def _pairs(kept_E: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Kept experts in rows, dropped ones in columns."""
    return kept_E[:, None] & ~kept_E[None]


class DroppedEnergy(SubsetLoss):
    """``p' G p``: the squared error of the routed output when P is left out and nothing else changes.

    HOPE (2026) minimises this form with products of norms in place of the exact ones; its diagonal alone is the sum
    of squares that scores of single experts see. Neither the experts that a router would choose in place of dropped
    ones nor the larger weights that it would give to the others are part of it.
    """

    def of(self, kept_BK: Indices) -> Floats:
        dropped_BE = np.ones((len(kept_BK), self.experts))
        np.put_along_axis(dropped_BE, kept_BK, 0.0, axis=1)
        losses: Floats = ((dropped_BE @ self.gram_EE) * dropped_BE).sum(1)
        return losses

    def _state(self, kept_E: NDArray[np.bool_]) -> tuple[float, Floats, Floats]:
        """The loss, half its slope towards dropping an expert, and the diagonal."""
        dropped_E = (~kept_E).astype(np.float64)
        slope_E = self.gram_EE @ dropped_E
        return float(dropped_E @ slope_E), slope_E, self.gram_EE.diagonal()

    def without(self, kept_E: NDArray[np.bool_]) -> Floats:
        loss, slope_E, energy_E = self._state(kept_E)
        return _only(loss + 2 * slope_E + energy_E, kept_E)

    def with_one(self, kept_E: NDArray[np.bool_]) -> Floats:
        loss, slope_E, energy_E = self._state(kept_E)
        return _only(loss - 2 * slope_E + energy_E, ~kept_E)

    def exchanged(self, kept_E: NDArray[np.bool_]) -> Floats:
        loss, slope_E, energy_E = self._state(kept_E)
        dropped_E, joined_E = 2 * slope_E + energy_E, energy_E - 2 * slope_E
        return _only(loss + dropped_E[:, None] + joined_E[None] - 2 * self.gram_EE, _pairs(kept_E))


class ScaledResidual(SubsetLoss):
    """``min_b ||sum_i g_i E_i - sum_{i in S} b_i g_i E_i||^2``: the rest when every kept expert has its best factor.

    With ``c = G 1`` that is ``1'G 1 - c_S' G_SS^-1 c_S``, what OMP-MoE (2026) pursues with experts as atoms. The
    factors stand for what renormalised router weights and a refit will do for the kept experts.
    """

    @cached_property
    def _system_EE(self) -> Floats:
        ridge = RIDGE * float(self.gram_EE.diagonal().mean()) or 1.0
        return self.gram_EE + ridge * np.eye(self.experts)

    @cached_property
    def _target_E(self) -> Floats:
        sums: Floats = self.gram_EE.sum(1)
        return sums

    @property
    def _whole(self) -> float:
        return float(self._target_E.sum())

    def of(self, kept_BK: Indices) -> Floats:
        losses = np.empty(len(kept_BK))
        for start in range(0, len(kept_BK), SOLVED):
            part_BK = kept_BK[start : start + SOLVED]
            target_BK = self._target_E[part_BK]
            system_BKK = self._system_EE[part_BK[:, :, None], part_BK[:, None, :]]
            factors_BK = np.linalg.solve(system_BKK, target_BK[..., None])[..., 0]
            losses[start : start + SOLVED] = self._whole - (target_BK * factors_BK).sum(1)
        return losses

    def _state(self, kept_E: NDArray[np.bool_]) -> tuple[float, Floats, Floats, Floats]:
        """The loss; factors and inverse of the kept experts; the columns ``[E, K]`` that join all experts to them."""
        kept = np.flatnonzero(kept_E)
        inverse_KK = np.linalg.inv(self._system_EE[np.ix_(kept, kept)]).astype(np.float64)
        factors_K = inverse_KK @ self._target_E[kept]
        return self._whole - float(self._target_E[kept] @ factors_K), factors_K, inverse_KK, self._system_EE[:, kept]

    def without(self, kept_E: NDArray[np.bool_]) -> Floats:
        loss, factors_K, inverse_KK, _ = self._state(kept_E)
        losses_E = np.full(self.experts, np.inf)
        losses_E[kept_E] = loss + factors_K**2 / inverse_KK.diagonal()
        return losses_E

    def with_one(self, kept_E: NDArray[np.bool_]) -> Floats:
        loss, factors_K, inverse_KK, joint_EK = self._state(kept_E)
        rest_E = self._target_E - joint_EK @ factors_K
        own_E = self._system_EE.diagonal() - ((joint_EK @ inverse_KK) * joint_EK).sum(1)
        with np.errstate(divide="ignore", invalid="ignore"):
            return _only(loss - rest_E**2 / own_E, ~kept_E)

    def exchanged(self, kept_E: NDArray[np.bool_]) -> Floats:
        loss, factors_K, inverse_KK, joint_EK = self._state(kept_E)
        scale_K, reach_EK = inverse_KK.diagonal(), joint_EK @ inverse_KK
        rest_E = self._target_E - joint_EK @ factors_K
        own_E = self._system_EE.diagonal() - (reach_EK * joint_EK).sum(1)
        # What is left of an expert's rest and of its own part once the expert of column k is gone.
        rest_EK = rest_E[:, None] + reach_EK * (factors_K / scale_K)
        own_EK = own_E[:, None] + reach_EK**2 / scale_K
        losses_EE = np.full((self.experts, self.experts), np.inf)
        with np.errstate(divide="ignore", invalid="ignore"):
            losses_EE[kept_E] = (loss + factors_K**2 / scale_K - rest_EK**2 / own_EK).T
        return _only(losses_EE, _pairs(kept_E))
