"""What ``quality.py`` measured, put together: the seeds of a recipe, the best baseline, the reference of CPU time."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from quality_recipes import RECIPES, REFERENCE
from quality_statistics import Ratio, ratio
from quality_store import Key, Store

Array = NDArray[Any]


@dataclass(frozen=True)
class Measured:
    """One recipe on one model: the means over its seeds.

    Attributes:
        store: Where the rows are.
        keys: The rows, one for each seed.
    """

    store: Store
    keys: tuple[Key, ...]

    @property
    def recipe(self) -> str:
        """Name of the recipe."""
        return self.keys[0].recipe

    @property
    def title(self) -> str:
        """Its name in tables."""
        return RECIPES[self.recipe].title

    @property
    def source(self) -> Key:
        """The row of the source."""
        return source_key(self.store, self.keys[0].model)

    def mean(self, name: str) -> float | None:
        """Mean of a figure over the seeds; ``None`` where it is unknown."""
        known = [self.store.rows[key].get(name) for key in self.keys]
        found = [value for value in known if value is not None]
        return statistics.fmean(found) if found else None

    def _array(self, name: str) -> Array:
        return np.mean([self.store.array(key, name) for key in self.keys], axis=0)

    def ratio(self, domain: str | None = None) -> Ratio:
        """Perplexity over that of the source: the geometric mean of the seeds, on all records or those of a domain."""
        domains, absent = self.store.array(self.source, "domains"), self.keys[0].absent
        losses, chosen = self._array("losses"), np.ones(len(domains), dtype=bool)
        if absent or domain:
            chosen = domains == (absent or domain)
        # Nothing else was measured after calibration without a domain.
        losses = losses if absent else losses[chosen]
        source, tokens = (self.store.array(self.source, name)[chosen] for name in ("losses", "tokens"))
        return ratio(losses, source, tokens)

    @cached_property
    def overall(self) -> Ratio:
        """The ratio on all records that were measured."""
        return self.ratio()

    @property
    def spread(self) -> float:
        """Half of the difference between the ratios of the best and the worst seed."""
        ratios = [self.store.rows[key]["ratio"][0] for key in self.keys]
        return (max(ratios) - min(ratios)) / 2

    @cached_property
    def right(self) -> Array:
        """Share of the seeds that answer each question right."""
        return self._array("right")

    def times_reference(self) -> float | None:
        """CPU time over that of the reference on the same number of tokens."""
        shares = []
        for key in self.keys:
            figures = self.store.rows[key]
            same = reference_time(self.store, key, figures["sequences"])
            if same is not None:
                shares.append(figures["cpu_seconds"] / same)
        return statistics.fmean(shares) if shares else None


def source_key(store: Store, model: str) -> Key:
    """The row of a model itself."""
    return next(key for key in store.rows if key.model == model and key.recipe == "source")


def reference_time(store: Store, key: Key, sequences: int) -> float | None:
    """CPU seconds of the reference on as many calibration sequences; ``None`` if they were not measured."""
    timed: dict[str, float] = {}
    for other, figures in store.rows.items():
        same = (other.model, other.experts, other.calibration) == (key.model, key.experts, key.calibration)
        if same and not other.absent and "cpu_seconds" in figures and figures["sequences"] == sequences:
            timed.setdefault(other.recipe, figures["cpu_seconds"])
    return timed.get(REFERENCE, timed.get(f"time/{sequences}"))


def measured(store: Store, model: str, experts: int, calibration: str, absent: str = "") -> list[Measured]:
    """What was measured of a model, in the order of the recipes; refused recipes are left out."""
    found = []
    for recipe in RECIPES:
        keys = tuple(
            key
            for key, figures in store.rows.items()
            if key._replace(seed=0) == Key(model, experts, recipe, 0, calibration, absent) and "refused" not in figures
        )
        if keys:
            found.append(Measured(store, keys))
    return found


def best_baseline(rows: Iterable[Measured]) -> Measured | None:
    """The published method of lowest perplexity."""
    baselines = [row for row in rows if RECIPES[row.recipe].group == "baseline"]
    return min(baselines, key=lambda row: row.overall.ratio, default=None)


def share_left(row: Measured, best: Measured) -> float:
    """Excess perplexity over that of the best baseline; ``nan`` where the baseline has none."""
    excess = best.overall.ratio - 1
    return (row.overall.ratio - 1) / excess if excess > 0 else float("nan")


def cases(store: Store) -> list[tuple[str, int, str]]:
    """Every model, number of experts, and the first calibration text that it was measured with."""
    found = dict.fromkeys((key.model, key.experts) for key in store.rows if key.recipe in RECIPES and not key.absent)
    return [(model, experts, calibrations(store, model)[0]) for model, experts in found]


def calibrations(store: Store, model: str) -> list[str]:
    """Calibration texts that a model was measured with."""
    return list(dict.fromkeys(key.calibration for key in store.rows if key.model == model and key.recipe in RECIPES))
