"""Hub-to-Hub conversions over a bad connection, and killed ones: the outcome of each.

Run: python benchmarks/hub_faults.py [--runs N] [--kills N] [--rate P] [--seed N]

The command itself, ``hcsmoe convert org/model --push-to me/model``, every second time with ``--low-disk``, talks
through the real client to the loopback server of the tests. Of the runs, each with faults of its own in both
directions, some succeed and others are refused after enough tries; what everybody sees of the new repository must be
everything or nothing, and the bytes those of a conversion that nothing disturbed. The kills hit a conversion at a
random moment of its downloads, its work and its uploads; the same command after it must end with the same content, and
no shard may arrive as a whole twice.
"""

import argparse
import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from sys import path as search_path

search_path.insert(0, str(Path(__file__).parents[1] / "tests"))

from hub.journey import Journey, make_hub
from hub_server import Fault, RandomFaults

TARGET = "me/model"
# The longest time after which a conversion is killed; even with slow bodies it has ended before.
MAX_SECONDS = 12.0
# Time for what a killed machine had sent to arrive.
SETTLING_SECONDS = 0.5


def undisturbed(folder: Path) -> dict[str, bytes]:
    """The visible result of an undisturbed conversion."""
    with make_hub() as hub:
        journey = Journey.prepare(folder, hub)
        done = journey.run(TARGET)
        if done.returncode:
            raise SystemExit(done.stderr)
        return journey.visible(TARGET)


def weather(folder: Path, expected: dict[str, bytes], *, rate: float, seed: int, words: list[str]) -> tuple[str, int]:
    """Makes one conversion over a bad connection; returns its outcome and the number of faults."""
    with make_hub() as hub:
        journey = Journey.prepare(folder, hub)
        # Up to seven faults per request: more than the client's six tries.
        hub.faults = faults = RandomFaults(seed, rate=rate, most=7)
        done = journey.run(TARGET, *words)
        content = journey.visible(TARGET)
        state = "everything visible" if content == expected else "HALF VISIBLE" if content else "nothing visible"
        if "Traceback" in done.stderr:
            return f"CRASHED, {state}: {done.stderr.splitlines()[-1]}", faults.count()
        return f"{'refused' if done.returncode else 'converted'}, {state}", faults.count()


def kill(folder: Path, expected: dict[str, bytes], *, moment: float, words: list[str]) -> str:
    """Kills one conversion, repeats it, and returns the outcome."""
    with make_hub() as hub:
        journey = Journey.prepare(folder, hub)
        hub.faults = lambda method, path: Fault.SLOW
        process = journey.start(TARGET, *words)
        time.sleep(moment)
        process.kill()
        process.communicate()
        time.sleep(SETTLING_SECONDS)
        before, arrived = journey.visible(TARGET), len(journey.arrivals())
        hub.faults = lambda method, path: None
        # A completed conversion leaves its folder, which another one must not touch without --overwrite.
        again = journey.run(TARGET, *words, *(["--overwrite"] if before and not words else []))
        twice = [oid for oid, count in journey.arrivals().items() if count > 1]
        if again.returncode or journey.visible(TARGET) != expected or before not in ({}, expected) or twice:
            return f"WRONG: {again.stderr.splitlines()[-2:]}"
        if before:
            return "killed when all was visible"
        return "killed with shards on the Hub, went on" if arrived else "killed before, went on"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--rate", type=float, default=0.25)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    chance, outcomes, faults = random.Random(asked.seed), Counter[str](), 0
    with tempfile.TemporaryDirectory() as name:
        expected = undisturbed(Path(name) / "undisturbed")
        for run in range(asked.runs):
            words = ["--low-disk"] if run % 2 else []
            folder = Path(name) / f"run-{run}"
            outcome, met = weather(folder, expected, rate=asked.rate, seed=asked.seed + run, words=words)
            outcomes[outcome] += 1
            faults += met
        for run in range(asked.kills):
            words = ["--low-disk"] if run % 2 else []
            moment = chance.uniform(2.0, MAX_SECONDS)
            outcomes[kill(Path(name) / f"kill-{run}", expected, moment=moment, words=words)] += 1
    for outcome, count in outcomes.most_common():
        print(f"{count:5}  {outcome}")
    print(f"{faults:5}  faults in the {asked.runs} runs over a bad connection")
    if any(word in outcome for outcome in outcomes for word in ("WRONG", "HALF", "CRASHED", "converted, nothing")):
        raise SystemExit("Something went wrong.")


if __name__ == "__main__":
    main()
