"""Lets every allocation of a layer fail in turn, and prints what came of it; takes minutes.

python every_allocation.py [RECIPE ...]
"""

import sys
import tempfile
from collections import Counter
from pathlib import Path

from worker import SCARCE, Worker


def main() -> None:
    """Prints every distinct end of a conversion, and how often it came."""
    with tempfile.TemporaryDirectory() as folder:
        worker = Worker(Path(folder))
        is_good = True
        for recipe in sys.argv[1:] or SCARCE:
            count = worker.allocations(recipe)["allocations"]
            found = Counter(worker.fail(recipe, number + 1) for number in range(count))
            print(f"{recipe}: {count} allocations")
            for verdict, times in found.most_common():
                print(f"  {times:5}  {verdict}")
                is_good &= verdict == "done" or verdict.startswith("message: ")
    sys.exit(not is_good)


if __name__ == "__main__":
    main()
