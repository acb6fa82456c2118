"""Lets every write, fsync, rename and the like of a conversion fail in turn, and prints what came of it; takes minutes.

    python tests/faults/every_fault.py [--variant NAME ...] [--fault NAME ...] [--every N]

Every line is one way in which conversions ended, and how often; the exit code is 1 if one of them is wrong.
"""

import argparse
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from faults.ask import asking
from faults.disk import How

# Name of the errno, if there is one, and what else happens.
FAULTS: dict[str, tuple[str, How]] = {
    "full": ("ENOSPC", How.KEEPS | How.HALF),
    "quota": ("EDQUOT", How.KEEPS),
    "broken": ("EIO", How.ONCE),
    "dead": ("EIO", How.KEEPS),
    "forbidden": ("EACCES", How.ONCE),
    # Only half of a write is done, and no error is reported.
    "short": ("", How.HALF),
    "killed": ("EIO", How.ENDS),
    "torn": ("EIO", How.ENDS | How.HALF),
}


def try_all(ask: Callable[..., Any], variant: str, fault: str, *, every: int = 1, first: int = 1) -> dict[int, Any]:
    """Lets the calls of a conversion fail, one in each run.

    Args:
        ask: Asks the process in which disks fail.
        variant: What to convert.
        fault: What fails.
        every: Tries one call in so many.
        first: The first call that is tried.

    Returns:
        Number of the call to what came of it.
    """
    error, how = FAULTS[fault]
    found, at = {}, first
    while True:
        found[at] = ask("fail", variant=variant, at=at, error=error, how=int(how))
        # A run may make a call more or less than another; it is over where the fault was not met.
        if not found[at]["call"]:
            return found
        at += every


def report(title: str, found: Mapping[int, Any]) -> bool:
    """Prints how often conversions came to which end; returns whether each may be."""
    wrong = defaultdict(list)
    for number, end in found.items():
        if end["wrong"]:
            wrong[end["wrong"]].append(f"{number} {end['call']}")
    print(f"{title}: {len(found)} runs, {sum(map(len, wrong.values()))} with a wrong end")
    for what, times in Counter(end["end"] for end in found.values()).most_common():
        print(f"  {times:5}  {what}")
    for what, places in wrong.items():
        print(f"  WRONG  {len(places)} times, at {', '.join(places[:3])}: {what}")
    sys.stdout.flush()
    return not wrong


def main() -> None:
    """Prints every distinct end of a conversion, and how often it came."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", nargs="+", default=["plain", "overwrite", "statistics", "mapped"])
    parser.add_argument("--fault", nargs="+", default=list(FAULTS), choices=list(FAULTS))
    parser.add_argument("--every", type=int, default=1, help="try one call in so many")
    wanted = parser.parse_args()
    is_good = True
    with asking() as ask:
        for variant in wanted.variant:
            for fault in wanted.fault:
                begun = time.monotonic()
                found = try_all(ask, variant, fault, every=wanted.every)
                is_good &= report(f"{variant}, {fault}, {time.monotonic() - begun:.0f} s", found)
    sys.exit(not is_good)


if __name__ == "__main__":
    main()
