"""Every combination of the method options, and a small set of recipes that covers every pair of their values.

A request names a value, or nothing, for each option. ``resolve`` turns requests that make sense into recipes, several
requests into the same one.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from itertools import chain, combinations, islice
from math import prod
from typing import Any

import numpy as np
from numpy.random import Generator

from hcsmoe_hub import ConvertOptions, MethodOptions, Preset
from hcsmoe_hub.checkpoint.source import Source
from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.model.source_model import read_model
from hcsmoe_hub.options import (
    Align,
    AlignTo,
    Budget,
    Clustering,
    Distance,
    Dominant,
    Features,
    KMeansStart,
    Layout,
    Linkage,
    Merge,
    Method,
    Propagate,
    Refit,
    RouterPolicy,
    Saliency,
    Similarity,
)
from hcsmoe_hub.planning.refusals import check_recipe
from hcsmoe_hub.recipe.recipe import Recipe
from hcsmoe_hub.recipe.resolve import _DECISIONS, resolve

SIMILARITIES = tuple(chain.from_iterable(combinations(Similarity, size + 1) for size in range(len(Similarity))))
_DOMAINS: Mapping[str, tuple[Any, ...]] = {
    "method": tuple(Method),
    "protect": ((), ((None, 1),)),
    # Factors need a rank, which is a number.
    "layout": tuple(layout for layout in Layout if layout is not Layout.FACTORED),
    "budget": tuple(Budget),
    "clustering": (None, *Clustering),
    "similarity": (None, *SIMILARITIES),
    "distance": (None, *Distance),
    "linkage": (None, *Linkage),
    "kmeans_start": (None, *KMeansStart),
    "max_cluster_size": (None, 2, 3),
    "merge": (None, *Merge),
    "dominant_weights": (None, (2.0, 1.0), (1.0, 0.0)),
    "features": (None, *Features),
    "align": (None, *Align),
    "align_to": (None, *AlignTo),
    "saliency": (None, *Saliency),
    "refit": (None, *Refit),
    "refit_passes": (None, 1, 2),
    "router": (None, *RouterPolicy),
    "propagate": (None, *Propagate),
    "dominant": (None, *Dominant),
}
_OPTIONS = {field.name for field in fields(MethodOptions)}
# Whether a value would be idle depends only on the choices before it, so what resolve decides comes in its order, after
# what it takes as given.
_ORDER = ("method", "protect", *_DECISIONS)
DOMAINS: Mapping[str, tuple[Any, ...]] = {
    name: _DOMAINS[name] for name in sorted(_OPTIONS & _DOMAINS.keys(), key=_ORDER.index)
}
NAMES = tuple(DOMAINS)
# No limit is a choice; elsewhere None means the default.
VALUES = [(name, value) for name in NAMES for value in DOMAINS[name] if value is not None or name == "max_cluster_size"]
# The hint of a refusal names the option that would have no effect.
IDLE = {f"leave `{name}` out": name for name in NAMES}
REQUESTS = prod(map(len, DOMAINS.values()))
# Attempts to find a random recipe, and random changes made to each.
ATTEMPTS, STEPS = 4000, 40
# Recipes of either value of a pair that are tried with the other value.
CROSSED = 10

Choices = Mapping[str, Any]


def options_for(recipe: Recipe, options: ConvertOptions) -> ConvertOptions:
    """Options for one recipe: the reduced model's hidden states are in no statistics file, so the model runs."""
    return replace(options, statistics=None) if recipe.propagates else options


class Space:
    """Every request, and its outcome on one model.

    Args:
        source: The checkpoint.
        options: Everything but the method.
    """

    def __init__(self, source: Source, options: ConvertOptions) -> None:
        self._model = read_model(source)
        self._options = options

    def decide(self, choices: Choices) -> Recipe:
        """The recipe of a request, as a plan decides it.

        Raises:
            PlanError: If there is none, or if it does not fit the model.
        """
        recipe = resolve(MethodOptions(preset=Preset.HC_SMOE, **choices))
        options = options_for(recipe, self._options)
        experts = options.experts or self._model.settings.experts
        check_recipe(self._model, recipe, options, experts=experts)
        return recipe

    def outcomes(self, choices: Choices | None = None, weight: int = 1) -> Iterator[tuple[int, Recipe | PlanError]]:
        """Iterates over all requests, in groups with the same outcome.

        Args:
            choices: Where to begin: values of the first options.
            weight: Requests that each of these stands for.

        Yields:
            How many requests, and their recipe or refusal. A recipe comes once; requests that spell out what others
            leave to the defaults are counted with these.
        """
        choices = choices or {}
        name, rest = NAMES[len(choices)], NAMES[len(choices) + 1 :]
        default = self._default(choices, name)
        for value in DOMAINS[name]:
            if value is None and default is not None:
                continue
            wanted = {**choices, name: value}
            times = 2 * weight if default is not None and value == default else weight
            try:
                decided = resolve(MethodOptions(preset=Preset.HC_SMOE, **wanted)) if rest else self.decide(wanted)
            except PlanError as refusal:
                if not rest or is_idle(refusal, name):
                    yield times * prod(len(DOMAINS[other]) for other in rest), refusal
                    continue
            else:
                if not rest:
                    yield times, decided
                    continue
            yield from self.outcomes(wanted, times)

    def _default(self, choices: Choices, name: str) -> Any:
        """The default of an omitted option; ``None`` if it has none or it is not known yet."""
        try:
            recipe = resolve(MethodOptions(preset=Preset.HC_SMOE, **choices))
            return None if None not in DOMAINS[name] else getattr(recipe, name)
        except PlanError:
            return None

    def repaired(self, wanted: Choices, kept: Iterable[str]) -> Recipe | None:
        """The recipe of a request after idle values were left out, those of ``kept`` excepted; ``None`` if none."""
        kept = set(kept)
        while True:
            try:
                return self.decide(wanted)
            except PlanError as refusal:
                idle = IDLE.get(refusal.hint)
                if idle is None or idle in kept:
                    return None
                wanted = {**wanted, idle: None}

    def draw(self, generator: Generator, fixed: Choices) -> Recipe | None:
        """A random recipe with some fixed values, ``None`` if the drawn values are incompatible."""
        wanted = {name: domain[generator.integers(len(domain))] for name, domain in DOMAINS.items()}
        # Half of the defaults stay: values that are compatible with only one other would hardly ever be drawn together.
        left_out = {name: None for name in NAMES if None in DOMAINS[name] and generator.integers(2)}
        return self.repaired({**wanted, **left_out, **fixed}, fixed)

    def changed(self, generator: Generator, recipe: Recipe, fixed: Choices) -> Recipe | None:
        """A recipe after a random change to one option, ``None`` if it is incompatible with the others."""
        free = [name for name in NAMES if name not in fixed]
        name = free[generator.integers(len(free))]
        value = DOMAINS[name][generator.integers(len(DOMAINS[name]))]
        return self.repaired({**choices_of(recipe), name: value}, fixed)

    def _walk(self, generator: Generator, fixed: Choices) -> list[Recipe]:
        """Random recipes with some fixed values, each with one change to the one before it."""
        drawn = (self.draw(generator, fixed) for _ in range(ATTEMPTS))
        found = list(islice(filter(None, drawn), 1))
        for _ in range(STEPS if found else 0):
            recipe = self.changed(generator, found[-1], fixed)
            if recipe is not None:
                found.append(recipe)
        return found

    def pool(self, generator: Generator) -> list[Recipe]:
        """Random recipes in which every value, and very likely every possible pair of values, occurs."""
        by_value = {value: self._walk(generator, dict([value])) for value in VALUES}
        found = list(dict.fromkeys(chain.from_iterable(by_value.values())))
        seen = {pair for recipe in found for pair in pairs_of(recipe)}
        for pair in combinations(VALUES, 2):
            if pair in seen or pair[0][0] == pair[1][0]:
                continue
            wanted = crossed(pair, *(by_value[value][-CROSSED:] for value in pair))
            recipe = next(filter(None, (self.repaired(choices, dict(pair)) for choices in wanted)), None)
            if recipe is not None:
                found.append(recipe)
                seen |= pairs_of(recipe)
        return found

    def covering(self, seed: int = 0) -> list[Recipe]:
        """A small set of recipes in which every pair of values occurs that occurs in the pool.

        Greedy: the recipe of the pool with most of the pairs that are missing is changed here and there for more.
        """
        generator = np.random.default_rng(seed)
        pool = {recipe: pairs_of(recipe) for recipe in self.pool(generator)}
        missing, chosen = set[Any]().union(*pool.values()), list[Recipe]()
        while missing:
            best = max(pool, key=lambda recipe: len(pool[recipe] & missing))
            gain = len(pool[best] & missing)
            for _ in range(STEPS):
                other = self.changed(generator, best, {})
                if other is not None and len(pairs_of(other) & missing) >= gain:
                    best, gain = other, len(pairs_of(other) & missing)
            chosen.append(best)
            missing -= pairs_of(best)
        return chosen

    def neighbours(self, recipe: Recipe, name: str) -> list[Recipe]:
        """Recipes with another value of one option and as few other differences as possible, nearest first."""
        choices, found = choices_of(recipe), dict[Recipe, int]()
        # What one value needs, such as fuzzy clusters, may be incompatible with another; the defaults replace it.
        defaults = {other: None for other in NAMES if None in DOMAINS[other]}
        for value in DOMAINS[name]:
            if value == choices[name] or (name, value) not in VALUES:
                continue
            for wanted in ({**choices, name: value}, {**choices, **defaults, name: value}):
                other = self.repaired(wanted, {name})
                if other is not None:
                    found.setdefault(other, len(differences(recipe, other)))
        return sorted(found, key=lambda other: found[other])


def crossed(pair: Any, first: list[Recipe], second: list[Recipe]) -> Iterator[dict[str, Any]]:
    """Requests with both values of a pair, made of recipes with the first and of recipes with the second value."""
    begin, end = (NAMES.index(name) for name, _ in pair)
    requests = [choices_of(recipe) for recipe in first + second]
    for one, other in zip(first, second, strict=False):
        choices = choices_of(one), choices_of(other)
        for cut in range(begin + 1, end + 1):
            requests.append({name: choices[number >= cut][name] for number, name in enumerate(NAMES)})
    # What comes after the pair, or has a default of its own, is the first to stand in the way.
    published = resolve(MethodOptions(preset=Preset.HC_SMOE))
    plain = {name: getattr(published, name) for name in NAMES if None not in DOMAINS[name]}
    plain = dict.fromkeys(NAMES[end:]) | plain
    for request in requests:
        yield {**request, **dict(pair)}
        yield {**request, **plain, **dict(pair)}


def is_idle(refusal: PlanError, name: str) -> bool:
    """Whether a request was refused because one option would have no effect."""
    return IDLE.get(refusal.hint) == name


def choices_of(recipe: Recipe) -> dict[str, Any]:
    """The request that spells a recipe out."""
    return {name: getattr(recipe, name) for name in NAMES}


def pairs_of(recipe: Recipe) -> set[Any]:
    """Pairs of values of a recipe, in the order of ``VALUES``."""
    chosen = [
        (name, value) for name, value in choices_of(recipe).items() if value is not None or name == "max_cluster_size"
    ]
    return set(combinations(chosen, 2))


def differences(one: Recipe, other: Recipe) -> list[str]:
    """Options that both recipes choose, and choose differently."""
    first, second = choices_of(one), choices_of(other)
    return [name for name in NAMES if None not in (first[name], second[name]) and first[name] != second[name]]


def describe(recipe: Recipe) -> str:
    """A recipe as one line: its choices, without those that are left open."""
    return " ".join(f"{name}={value}" for name, value in recipe.as_dict().items() if value is not None)
