"""Every combination of the method options ends in a checkpoint or in a refusal with a reason; no choice is ignored."""

import importlib
from dataclasses import fields
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
from places import ROOT
from tiny_models import build, options, token_ids

from hcsmoe_hub import MethodOptions, convert
from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.hub.open import open_source
from hcsmoe_hub.options import Layout, Method, Preset
from hcsmoe_hub.recipe import resolve as resolving
from hcsmoe_hub.recipe.recipe import Recipe
from hcsmoe_hub.recipe.resolve import resolve

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(ROOT / "benchmarks"))
    recipe_space, sweeping = importlib.import_module("recipe_space"), importlib.import_module("sweep")

# Each is one test, so that several processes can share the work.
SHARDS = 12
SEEDS = range(4)


class Case:
    """A tiny Mixtral with calibration statistics, and the outcomes of its recipes.

    Attributes:
        space: All requests.
        sweep: Converts.
        covering: Recipes that cover every compatible pair of values.
    """

    def __init__(self, folder: Path) -> None:
        model = build(folder / "model")
        # Few different tokens: layers differ in how many experts are used much, and one expert is not used at all.
        wanted = options(model, 5, ids=token_ids() % 4, statistics=folder / "statistics", overwrite=True, device="cpu")
        convert(model, wanted)
        source = open_source(str(model))
        self.space = recipe_space.Space(source, wanted)
        self.sweep = sweeping.Sweep(source, wanted)

    @cached_property
    def covering(self) -> list[Recipe]:
        found: list[Recipe] = self.space.covering()
        return found


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("sweep"))


def draw(seed: int, requests: int) -> list[dict[str, Any]]:
    """Random requests, every value of every option as likely as the others."""
    generator = np.random.default_rng(seed)
    domains = recipe_space.DOMAINS
    return [{name: domains[name][generator.integers(len(domains[name]))] for name in domains} for _ in range(requests)]


# Coverage


def test_every_choice_of_the_method_is_swept_but_preset_layers_seed_and_factors() -> None:
    assert {field.name for field in fields(MethodOptions)} - {"preset", "layers", "seed", "compress"} == set(
        recipe_space.NAMES
    )


def words_in(annotation: Any) -> set[StrEnum]:
    """The words that an option takes, by its type."""
    if isinstance(annotation, type) and issubclass(annotation, StrEnum):
        return set(annotation)
    return {word for part in get_args(annotation) for word in words_in(part)}


def test_every_word_of_a_choice_is_swept() -> None:
    types = get_type_hints(MethodOptions)
    # Factors need a rank, which is a number.
    words = {word for name in recipe_space.NAMES for word in words_in(types[name])} - {Layout.FACTORED}
    swept = [value for domain in recipe_space.DOMAINS.values() for value in domain]
    assert words - {word for value in swept for word in (value if isinstance(value, tuple) else [value])} == set()


def test_options_are_decided_in_the_order_in_which_they_are_swept() -> None:
    undecided = [name for name in recipe_space.NAMES if name not in resolving._DECISIONS]
    assert (*undecided, *resolving._DECISIONS) == recipe_space.NAMES


def test_a_choice_may_be_left_out_where_the_published_method_has_no_default_of_its_own() -> None:
    published = resolve(MethodOptions(preset=Preset.HC_SMOE))
    assert all(getattr(published, name) in domain for name, domain in recipe_space.DOMAINS.items())


def test_every_request_for_pruning_is_counted_once_and_every_recipe_comes_once(case: Case) -> None:
    found = list(case.space.outcomes({"method": Method.PRUNE}))
    recipes = [outcome for _, outcome in found if isinstance(outcome, Recipe)]
    assert sum(times for times, _ in found) == recipe_space.REQUESTS // len(Method)
    assert len(recipes) == len(set(recipes)) > 0


@pytest.mark.parametrize("seed", SEEDS)
def test_a_request_whose_beginning_has_an_idle_value_is_refused_for_that_value(case: Case, seed: int) -> None:
    for request in draw(seed, 100):
        names = list(request)
        for number, name in enumerate(names):
            beginning = {other: request[other] for other in names[: number + 1]}
            refusal = outcome_of(case, beginning)
            if isinstance(refusal, PlanError) and recipe_space.is_idle(refusal, name):
                whole = outcome_of(case, request)
                assert isinstance(whole, PlanError)
                assert whole.hint == refusal.hint
                break


def outcome_of(case: Case, request: dict[str, Any]) -> Recipe | PlanError:
    """The outcome of a request."""
    try:
        recipe: Recipe = case.space.decide(request)
    except PlanError as refusal:
        return refusal
    return recipe


@pytest.mark.parametrize("seed", SEEDS)
def test_a_request_is_a_recipe_or_is_refused_with_a_reason_and_a_hint(case: Case, seed: int) -> None:
    for request in draw(seed, 500):
        outcome = outcome_of(case, request)
        if isinstance(outcome, PlanError):
            assert outcome.message
            assert outcome.hint
        else:
            assert {name for name, value in request.items() if value not in (None, getattr(outcome, name))} == set()


# Outcomes


@pytest.mark.parametrize("shard", range(SHARDS))
def test_every_compatible_pair_of_values_gives_a_sound_checkpoint_or_a_refusal_with_a_reason(
    case: Case, shard: int
) -> None:
    recipes = case.covering[shard::SHARDS]
    for recipe in recipes:
        case.sweep.run(recipe)
    assert {recipe_space.describe(recipe): failure for recipe, failure in case.sweep.failed.items()} == {}
    assert all(refusal.message and refusal.hint for refusal in case.sweep.refused.values())
    assert any(recipe in case.sweep.digests for recipe in recipes)


@pytest.mark.parametrize("name", recipe_space.NAMES)
def test_every_value_of_an_option_changes_the_result_of_some_recipe(case: Case, name: str) -> None:
    values = [value for other, value in recipe_space.VALUES if other == name]
    ignored = [value for value in values if case.sweep.effect(case.space, case.covering, name, value) is None]
    assert ignored == []
