"""The process in which disks fail.

Started by ``conftest.py`` and ``every_fault.py``; requests and answers are lines of JSON.
"""

import json
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any


def main() -> None:
    """Answers requests: ``{"do": name of a method of Trials, argument: value}``."""
    # The libraries are imported here, so that whatever they print on stdout comes before the first answer.
    from faults.trials import Trials

    with tempfile.TemporaryDirectory(prefix="hcsmoe-faults-") as folder:
        trials = Trials(Path(folder))
        print(json.dumps({"answer": "ready"}), flush=True)
        for line in sys.stdin:
            request: dict[str, Any] = json.loads(line)
            try:
                answer = {"answer": getattr(trials, request.pop("do"))(**request)}
            # Whatever it is, it belongs to the process that asks.
            except BaseException:
                answer = {"failure": traceback.format_exc()}
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
