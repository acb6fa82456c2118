"""Two conversions of one repository with one cache at the same time, where locks do not hold: are both right?

Run: python benchmarks/shared_cache.py [--runs N]

Needs Linux and a C++ compiler: a small library makes ``flock`` succeed for everybody, as it does on some shared file
systems. Each run converts a repository of the loopback server of the tests to 4 and to 6 experts at once, with whole
shards and with ``--low-disk``. Both must write the bytes that they write alone, and every file in the cache must have
the content that its name promises.
"""

import argparse
import tempfile
from pathlib import Path
from sys import path as search_path

search_path.insert(0, str(Path(__file__).parents[1] / "tests"))

from hub.together import WAYS, build_no_locks, convert_alone, convert_together


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    asked = parser.parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory() as name:
        no_locks = build_no_locks(Path(name))
        (Path(name) / "alone").mkdir()
        expected = convert_alone(Path(name) / "alone")
        for way, words in WAYS.items():
            right = 0
            for run in range(asked.runs):
                folder = Path(name) / f"{way}-{run}"
                folder.mkdir()
                problems = convert_together(folder, expected, words, no_locks)
                right += not problems
                for problem in problems:
                    print(f"{way}, run {run}: {problem}", flush=True)
            print(f"{way}: {right} of {asked.runs} pairs right", flush=True)
            wrong += asked.runs - right
    if wrong:
        raise SystemExit("Something went wrong.")


if __name__ == "__main__":
    main()
