"""Kills conversions at random moments, repeats them, and compares the results with that of an undisturbed run.

Run: python benchmarks/kills.py [--models example sharded] [--kills 100] [--seed 0] [--json benchmarks/kills.json]

The command itself, ``hcsmoe convert``, in a process group of its own, is sent SIGKILL at a moment that is drawn from
the whole length of an undisturbed run; a quarter of the runs are killed a second time. The same command then finishes
what is there. Every file of the result must be the one of the undisturbed run, byte for byte; only times and peaks of
memory in ``hcsmoe.json`` and on the card may differ. What has to be done twice is the CPU time between the last line of
the journal and the kill, in units of one layer's.

Kills that the JSON file holds already, of the same commands and seed, are not repeated.
"""

import argparse
import json
import random
import shutil
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from fresh_process import machine
from same_result import content, differences
from synthetic import IDS_FILE, Shape, write_checkpoint
from watched_run import JOURNAL, OUTPUT, Watched, convert

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny-mixtral"
# 300 MB in ten shards of the source and about six of the result.
SHARDED = Shape(family="mixtral", hidden=512, width=1344, layers=9, experts=8, active=2, heads=8)
SHARDED_WORDS = ["--experts", "4", "--preset", "hc-smoe", "--max-shard-size", "32MB"]
SEQUENCES, LENGTH = 4, 256
# Share of the runs that are killed twice.
TWICE = 0.25
# Signals come up to so many seconds after the CPU time that was drawn, so that they also hit waits for the disk.
MOST_DELAY = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A conversion that is killed again and again.

    Attributes:
        name: In the file.
        words: Arguments of ``hcsmoe convert``.
        folder: Where it runs.
    """

    name: str
    words: Sequence[str]
    folder: Path

    def fresh(self, name: str) -> Path:
        """An empty folder to run in."""
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Undisturbed:
    """The run that others are compared with.

    Attributes:
        folder: Its result.
        run: What was seen of it.
        layer: CPU seconds of one layer.
    """

    folder: Path
    run: Watched
    layer: float

    @classmethod
    def of(cls, case: Case) -> "Undisturbed":
        """Runs a case to its end."""
        folder = case.fresh("undisturbed")
        run = convert(folder, case.words)
        if run.status or run.began is None:
            raise SystemExit(f"{case.name}: {run.messages}")
        marks = [run.began, *run.commits]
        # Without a journal there is nothing to go on from, and all layers together are one.
        steps = [after - before for before, after in pairwise(marks)] or [run.cpu - run.began]
        return cls(folder=folder / OUTPUT, run=run, layer=statistics.median(steps))


def kill(case: Case, undisturbed: Undisturbed, number: int, seed: int) -> dict[str, Any]:
    """Kills one run of a case once or twice, lets the same command finish it, and returns what was found."""
    chance, folder = random.Random(f"{case.name} {seed} {number}"), case.fresh("killed")
    kills, wanted = list[dict[str, float]](), 1 + (chance.random() < TWICE)
    while len(kills) < wanted:
        moment, delay = chance.uniform(0, undisturbed.run.cpu), chance.uniform(0, MOST_DELAY)
        run = convert(folder, case.words, kill_after=moment, delay=delay)
        if run.was_killed:
            kills.append(
                {
                    "moment": round(run.cpu / undisturbed.run.cpu, 3),
                    "commits": len(run.commits),
                    "repeated_layers": round(run.unsaved / undisturbed.layer, 3),
                }
            )
        elif not run.status and kills:
            # What was left took less time than was drawn for the second kill.
            break
        elif not run.status:
            shutil.rmtree(folder / OUTPUT)
        else:
            return {"number": number, "kills": kills, "is_identical": False, "differs": [run.messages]}
    if not is_complete(folder / OUTPUT):
        run = convert(folder, case.words)
    differs = [run.messages] if run.status > 0 else differences(folder / OUTPUT, undisturbed.folder)
    return {
        "number": number,
        "kills": kills,
        "seconds_to_finish": round(run.seconds, 1),
        "is_identical": not differs,
        "differs": differs,
    }


def is_complete(result: Path) -> bool:
    """Whether a killed run had nothing left to do."""
    return (result / "config.json").exists() and not (result / JOURNAL.parts[0]).exists()


def summary(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How many results are identical, and what had to be done twice."""
    repeated = sorted(each["repeated_layers"] for record in records for each in record["kills"])
    # Before the first layer there is nothing to repeat.
    amid_layers = [layers for layers in repeated if layers > 0]
    return {
        "runs": len(records),
        "identical": sum(record["is_identical"] for record in records),
        "kills": len(repeated),
        "repeated_layers": {
            "median": statistics.median(repeated),
            "median_amid_layers": statistics.median(amid_layers) if amid_layers else None,
            "mean": round(statistics.fmean(repeated), 3),
            "most": repeated[-1],
            "deciles": [repeated[len(repeated) * tenth // 10] for tenth in range(10)],
        },
    }


def measure(case: Case, known: dict[str, Any], asked: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Kills a case as often as asked, but for what is known already; yields the record after each run."""
    undisturbed = Undisturbed.of(case)
    digests = content(undisturbed.folder)
    settings = {"command": ["hcsmoe", "convert", *case.words], "seed": asked.seed, "result": digests}
    record: dict[str, Any] = settings | {
        "undisturbed": {
            "seconds": round(undisturbed.run.seconds, 1),
            "cpu_seconds": round(undisturbed.run.cpu, 1),
            "layer_cpu_seconds": round(undisturbed.layer, 2),
            "commits": len(undisturbed.run.commits),
        }
    }
    records = known["records"] if {name: known.get(name) for name in settings} == settings else []
    for number in range(len(records), asked.kills):
        records.append(kill(case, undisturbed, number, asked.seed))
        print(case.name, json.dumps(records[-1]), flush=True)
        yield record | summary(records) | {"records": records}


def cases(names: Sequence[str], folder: Path) -> list[Case]:
    """The conversions that are killed, their sources written."""
    found = []
    for name in names:
        place = folder / name
        place.mkdir(parents=True, exist_ok=True)
        # Copied, so that the command is the same on every machine.
        source = place / "model"
        words = ["--experts", "4"]
        if name == "example":
            shutil.copytree(EXAMPLE, source, dirs_exist_ok=True)
        else:
            source.mkdir(exist_ok=True)
            write_checkpoint(source, SHARDED, sequences=SEQUENCES, length=LENGTH)
            words = [*SHARDED_WORDS, "--calibration", f"../model/{IDS_FILE}"]
        found.append(Case(name=name, words=["../model", *words], folder=place))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=("example", "sharded"), default=["example", "sharded"])
    parser.add_argument("--kills", type=int, default=100, help="runs of each model that are killed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file of the outcome; what it holds already is not repeated")
    asked = parser.parse_args()
    known = json.loads(asked.json.read_text()) if asked.json and asked.json.exists() else {}
    found = {"machine": machine(), "models": known.get("models", {})}
    with tempfile.TemporaryDirectory() as name:
        for case in cases(asked.models, Path(name)):
            for record in measure(case, found["models"].get(case.name, {}), asked):
                found["models"][case.name] = record
                if asked.json:
                    asked.json.write_text(json.dumps(found, indent=1) + "\n")
    for model, record in found["models"].items():
        print(model, json.dumps({name: record[name] for name in summary(record["records"])}))
    if any(record["identical"] < record["runs"] for record in found["models"].values()):
        raise SystemExit("Some results differ.")


if __name__ == "__main__":
    main()
