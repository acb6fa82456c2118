"""Converts a model by every combination of the method options, and checks every outcome.

Run: OMP_NUM_THREADS=1 python benchmarks/sweep.py [--count] [--sample N | --all] [--shard I/N] [--output FILE]

Without further options, a covering set of recipes is converted: every pair of values that can occur together occurs.
Then two conversions are sought for each value of each option that differ in this choice and in the bytes of their
results, so that no value is taken and ignored. The model is read from calibration statistics.
"""

import argparse
import hashlib
import json
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from recipe_space import ATTEMPTS, REQUESTS, VALUES, Space, choices_of, describe, differences, options_for, pairs_of
from safetensors import SafetensorError
from safetensors.torch import load_file

from hcsmoe_hub import CalibrationOptions, ConvertOptions, MethodOptions, convert, execute, plan
from hcsmoe_hub.checkpoint.source import Source
from hcsmoe_hub.errors import HcsmoeError
from hcsmoe_hub.hub.open import open_source
from hcsmoe_hub.recipe.recipe import Recipe
from hcsmoe_hub.report import REPORT_FILE

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny-mixtral"
# Pairs of results to compare before a value counts as having no effect.
COMPARISONS = 24
# A late refusal, and exceptions that a defect of the library may raise; any other ends the sweep.
FAILURES: tuple[type[Exception], ...] = (HcsmoeError, ArithmeticError, AssertionError, AttributeError, LookupError)
FAILURES += (NameError, OSError, RuntimeError, SafetensorError, TypeError, ValueError)


@dataclass(slots=True)
class Sweep:
    """Converts recipe after recipe into the same folder.

    Attributes:
        source: The checkpoint.
        options: Everything but the method; names a statistics file and an output folder.
        digests: What every converted recipe gave: a hash of the weights, the config and the labels.
        refused: Recipes that the plan refused, by hint and message.
        failed: Where and how other recipes failed.
    """

    source: Source
    options: ConvertOptions
    digests: dict[Recipe, str] = field(default_factory=dict)
    refused: dict[Recipe, HcsmoeError] = field(default_factory=dict)
    failed: dict[Recipe, str] = field(default_factory=dict)

    def run(self, recipe: Recipe) -> str | None:
        """Converts with a recipe, unless already done; returns the digest of its result, ``None`` if there is none."""
        if recipe not in self.digests.keys() | self.refused.keys() | self.failed.keys():
            method = MethodOptions(**choices_of(recipe), seed=recipe.seed)
            options = replace(options_for(recipe, self.options), method=method)
            try:
                try:
                    planned = plan(self.source, options)
                except HcsmoeError as refusal:
                    self.refused[recipe] = refusal
                else:
                    execute(planned)
                    self.digests[recipe] = check_result(planned.output, recipe)
            except FAILURES as error:
                last = traceback.extract_tb(error.__traceback__)[-1]
                self.failed[recipe] = f"{last.filename}:{last.lineno}: {type(error).__name__}: {error}"
        return self.digests.get(recipe)

    def effect(self, space: Space, recipes: Iterable[Recipe], name: str, value: Any) -> tuple[Recipe, Recipe] | None:
        """Looks for two similar recipes, one with a value, whose results differ.

        Args:
            space: Knows what else there is.
            recipes: Where the value may be met.
            name: The option.
            value: One of its values.
        """
        bases = (recipe for recipe in recipes if getattr(recipe, name) == value and recipe not in self.refused)
        pairs = islice(((one, other) for one in bases for other in space.neighbours(one, name)), 4 * COMPARISONS)
        for one, other in sorted(pairs, key=lambda pair: len(differences(*pair)))[:COMPARISONS]:
            found, expected = self.run(other), self.run(one)
            if found is not None and expected is not None and found != expected:
                return one, other
        return None


def check_result(folder: Path, recipe: Recipe) -> str:
    """Checks a result, whose structure the conversion has verified itself.

    Returns:
        A hash of its weights, its config, and the labels of its experts.

    Raises:
        ValueError: If a weight is not finite, or if the report names another method.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for shard in sorted(folder.glob("*.safetensors")):
        digest.update(shard.read_bytes())
        broken = [name for name, tensor in load_file(shard).items() if not tensor.isfinite().all()]
        if broken:
            raise ValueError(f"{broken[0]} is not finite")
    report = json.loads((folder / REPORT_FILE).read_text())
    if report["method"] != json.loads(json.dumps(recipe.as_dict())):
        raise ValueError(f"{REPORT_FILE} names another method: {report['method']}")
    digest.update(json.dumps([layer["labels"] for layer in report["layers"]]).encode())
    return digest.hexdigest()


def count(space: Space, covered: Iterable[Recipe]) -> dict[str, Any]:
    """Counts requests and recipes, and looks for pairs of values that the covering set lacks."""
    missing = set[Any]()
    have = {pair for recipe in covered for pair in pairs_of(recipe)}
    accepted, recipes, refused = 0, 0, Counter[str]()
    for times, outcome in space.outcomes():
        if isinstance(outcome, Recipe):
            accepted, recipes = accepted + times, recipes + 1
            missing |= pairs_of(outcome) - have
        else:
            refused[outcome.hint] += times
    total = accepted + refused.total()
    assert total == REQUESTS, f"{total} requests were counted, not {REQUESTS}"
    print(f"{REQUESTS} requests: {accepted} accepted as {recipes} recipes, {refused.total()} refused:")
    for hint, number in refused.most_common():
        print(f"  {number:>14}  {hint}")
    print(f"pairs of values that the covering set lacks: {len(missing)} {sorted(map(str, missing))[:5]}", flush=True)
    return {"requests": REQUESTS, "accepted": accepted, "recipes": recipes, "refused": dict(refused.most_common())}


def summarise(sweep: Sweep, space: Space, covering: list[Recipe]) -> dict[str, Any]:
    """Prints the outcomes of the recipes, and the values without any effect."""
    silent = []
    for name, value in VALUES:
        pair = sweep.effect(space, covering, name, value)
        if pair is None:
            silent.append(f"{name}={value}")
        elif others := [other for other in differences(*pair) if other != name]:
            print(f"{name}={value} comes with another {', '.join(others)}")
    print(f"converted {len(sweep.digests)}, refused by the plan {len(sweep.refused)}, failed {len(sweep.failed)}")
    for hint, number in Counter(error.hint for error in sweep.refused.values()).most_common():
        print(f"  refused {number}: {hint}")
    for recipe, failure in sweep.failed.items():
        print(f"  failed: {failure}\n    {describe(recipe)}")
    print(f"values without any effect: {', '.join(silent) or 'none'}")
    return {
        "converted": len(sweep.digests),
        "refused": [[describe(recipe), error.message, error.hint] for recipe, error in sweep.refused.items()],
        "failed": [[describe(recipe), failure] for recipe, failure in sweep.failed.items()],
        "changes_nothing": silent,
    }


def chosen_recipes(space: Space, covering: list[Recipe], arguments: argparse.Namespace) -> Iterator[Recipe]:
    """The recipes to convert: every N-th of the requested ones."""
    recipes: Iterable[Recipe] = covering
    if arguments.all:
        recipes = (outcome for _, outcome in space.outcomes() if isinstance(outcome, Recipe))
    elif arguments.sample:
        generator = np.random.default_rng(arguments.seed)
        drawn = (space.draw(generator, {}) for _ in range(ATTEMPTS * arguments.sample))
        recipes = islice((recipe for recipe in drawn if recipe is not None), arguments.sample)
    index, shards = map(int, arguments.shard.split("/"))
    return islice(recipes, index - 1, None, shards)


def main() -> int:
    """Converts the requested recipes and prints the outcomes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--all", action="store_true", help="convert by every recipe; takes days, see --shard")
    which.add_argument("--sample", type=int, metavar="N", help="convert by N random recipes")
    parser.add_argument("--count", action="store_true", help="only count all requests; takes half an hour")
    parser.add_argument("--shard", default="1/1", metavar="I/N", help="convert by every N-th recipe, from the I-th")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random recipes")
    parser.add_argument("--source", type=Path, default=EXAMPLE, help="checkpoint to convert")
    parser.add_argument("--experts", type=int, default=5, help="experts to keep")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the outcome here, as JSON")
    arguments = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="hcsmoe-sweep-") as folder:
        options = ConvertOptions(
            experts=arguments.experts,
            output=Path(folder) / "result",
            overwrite=True,
            device="cpu",
            statistics=Path(folder) / "statistics",
            calibration=CalibrationOptions(samples=8, sequence_length=128, feature_tokens=256),
        )
        source = open_source(str(arguments.source))
        space, sweep = Space(source, options), Sweep(source, options)
        covering = space.covering(arguments.seed)
        print(f"covering set: {len(covering)} recipes, {time.perf_counter() - start:.1f} s", flush=True)
        if arguments.count:
            document = count(space, covering)
        else:
            convert(source, options)
            for number, recipe in enumerate(chosen_recipes(space, covering, arguments), 1):
                sweep.run(recipe)
                if number % 100 == 0:
                    print(f"{number} recipes, {time.perf_counter() - start:.0f} s", flush=True)
            document = summarise(sweep, space, covering)
        print(f"{time.perf_counter() - start:.0f} s")
    if arguments.output:
        arguments.output.write_text(json.dumps(document, indent=2) + "\n")
    return 1 if sweep.failed else 0


if __name__ == "__main__":
    sys.exit(main())
