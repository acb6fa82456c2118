"""Pushes over a bad connection, and pushes that are killed, many times: what becomes of each.

Run: python benchmarks/hub_faults.py [--runs N] [--kills N] [--rate P] [--seed N]

The real client talks to the loopback server of the tests. Of the runs, each with faults of its own, some succeed and
others are refused after enough tries; what everybody sees of a repository must be everything or nothing. The kills hit
a push at a random moment; the one after it must end with the same content, and no shard may arrive as a whole twice.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from hub.folders import SHARD_BYTES, read_folder, write_folder
from hub_client import PUSHER, WRITER, Machine
from hub_server import Account, Fault, Hub, RandomFaults

# Pushes that one process makes side by side.
PUSHES_AT_ONCE = 10
# The longest time after which a push is killed; some are done by then, though every body is slow.
MAX_SECONDS = 7.0


def visible(hub: Hub, repo_id: str) -> dict[str, bytes]:
    """What everybody sees of a repository, beside what the Hub put there."""
    if ("models", repo_id) not in hub.repositories:
        return {}
    contents = hub.model(repo_id).contents()
    return {name: content for name, content in contents.items() if name != ".gitattributes"}


def call(folder: Path, repo_id: str) -> dict[str, Any]:
    """One push, as ``tests/hub/pusher.py`` takes it."""
    return {"action": "publish", "folder": str(folder), "repo_id": repo_id, "token": WRITER}


def storm(folder: Path, machine: Machine, *, runs: int, rate: float, seed: int) -> Counter[str]:
    """Counts what became of pushes over a bad connection."""
    expected, outcomes = read_folder(folder), Counter[str]()
    for first in range(0, runs, PUSHES_AT_ONCE):
        with Hub(tokens={WRITER: Account(name="me", role="write")}) as hub:
            # Up to seven faults per request: more than the client's six tries.
            hub.faults = faults = RandomFaults(seed + first, rate=rate, most=7)
            calls = {f"me/run-{run}": call(folder, f"me/run-{run}") for run in range(min(PUSHES_AT_ONCE, runs - first))}
            for repo_id, answer in machine.run(hub.url, calls, (PUSHER,)).items():
                content = visible(hub, repo_id)
                state = "all visible" if content == expected else "HALF VISIBLE" if content else "nothing visible"
                outcomes[f"{'refused' if 'refused' in answer else 'pushed'}, {state}"] += 1
            outcomes["faults"] += faults.count()
    return outcomes


def kill(folder: Path, machine: Machine, *, moment: float) -> str:
    """Kills one push, makes it again, and says what became of it."""
    with Hub(tokens={WRITER: Account(name="me", role="write")}) as hub:
        hub.faults = lambda method, path: Fault.SLOW
        process = subprocess.Popen(
            [sys.executable, str(PUSHER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=machine.environment(hub.url),
            cwd=machine.folder,
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps({"it": call(folder, "me/killed")}).encode())
        process.stdin.close()
        process.stdin = None
        time.sleep(moment)
        process.kill()
        process.communicate()
        # What the machine had sent before it died still arrives.
        time.sleep(0.5)
        expected, before = read_folder(folder), visible(hub, "me/killed")
        hub.faults = lambda method, path: None
        again = machine.run(hub.url, {"it": call(folder, "me/killed")}, (PUSHER,))["it"]
        is_refused = "holds 5 files already" in again.get("message", "")
        bodies = [
            request.path for request in hub.requests if request.method == "PUT" and request.received == SHARD_BYTES
        ]
        if visible(hub, "me/killed") != expected or before not in ({}, expected) or len(set(bodies)) != len(bodies):
            return "WRONG"
        # A push that had committed already is no half one: the next has nothing to do, and says why.
        return "killed after the commit" if is_refused and before == expected else "killed before the commit, went on"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--rate", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        machine, folder = Machine(Path(name)), write_folder(Path(name) / "result")
        chance = random.Random(asked.seed)
        outcomes = storm(folder, machine, runs=asked.runs, rate=asked.rate, seed=asked.seed)
        for _ in range(asked.kills):
            outcomes[kill(folder, machine, moment=chance.uniform(0.2, MAX_SECONDS))] += 1
    for outcome, count in outcomes.most_common():
        print(f"{count:5}  {outcome}")
    if any(outcome in ("WRONG", "pushed, nothing visible") or "HALF" in outcome for outcome in outcomes):
        raise SystemExit("Something went wrong.")


if __name__ == "__main__":
    main()
