"""Runs the commands of rows, leaves out what is done already, and reads what they measured."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout
from io import StringIO
from math import sqrt
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from paper_commands import Commands
from paper_data import Conversion

from hcsmoe_hub.checkpoint.unfinished import UNFINISHED
from hcsmoe_hub.report import REPORT_FILE

Runner = Callable[[Sequence[str]], None]


class Accuracy(NamedTuple):
    """Share of questions answered right, and its standard error, ``None`` where lm-eval gives none."""

    value: float
    error: float | None


def in_a_process(words: Sequence[str]) -> None:
    """Runs ``hcsmoe`` in a process of its own, so that its memory is free again afterwards.

    Raises:
        CalledProcessError: If it fails; it has then printed why.
    """
    subprocess.run([sys.executable, "-P", "-m", "hcsmoe_hub.cli", *words], check=True)


def here(words: Sequence[str]) -> None:
    """Runs ``hcsmoe`` in this process, which has loaded its libraries already.

    Raises:
        RuntimeError: If it fails; it has then printed why.
    """
    from hcsmoe_hub.cli.app import app

    try:
        with redirect_stdout(StringIO()):
            app(args=list(words), prog_name="hcsmoe")
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"hcsmoe {' '.join(words)} ended with {end.code}") from end


class Runs:
    """Makes and measures checkpoints.

    Args:
        commands: What to run.
        run: How to run it.
        removes: Remove the weights of a result once it is measured.
    """

    def __init__(self, commands: Commands, run: Runner, *, removes: bool = False) -> None:
        self.commands, self._run, self._removes = commands, run, removes

    def measured(self, conversion: Conversion, group: str) -> dict[str, Any]:
        """Measures of a checkpoint, by kind; it is made and measured now unless that was done before."""
        if not self.is_measured(conversion, group):
            if conversion.recipe is not None and not self.is_converted(conversion):
                self._run(self.commands.convert(conversion))
            self._run(self.commands.evaluate(conversion, group))
        if self._removes and conversion.recipe is not None:
            for file in self.commands.result(conversion).glob("*.safetensors"):
                file.unlink()
        return self._measures(conversion)

    def is_converted(self, conversion: Conversion) -> bool:
        """Whether a conversion is complete, and its weights are still there."""
        folder = self.commands.result(conversion)
        is_complete = (folder / REPORT_FILE).exists() and not (folder / UNFINISHED).exists()
        return is_complete and any(folder.glob("*.safetensors"))

    def is_measured(self, conversion: Conversion, group: str) -> bool:
        """Whether its figures hold what is asked for, on as many questions."""
        found = self._measures(conversion)
        if self.commands.measures:
            return {word[2:] for word in self.commands.measures if word.startswith("--")} <= found.keys()
        settings = found.get("tasks", {}).get("settings", {"tasks": [], "limit": None})
        is_all = set(self.commands.data.tasks[group]) <= set(settings["tasks"])
        return is_all and settings.get("limit") == self.commands.limit

    def report(self, conversion: Conversion) -> dict[str, Any]:
        """What ``hcsmoe.json`` of a result says."""
        found: dict[str, Any] = json.loads((self.commands.result(conversion) / REPORT_FILE).read_text("utf-8"))
        return found

    def _measures(self, conversion: Conversion) -> dict[str, Any]:
        file = self.commands.figures(conversion)
        found: dict[str, Any] = json.loads(file.read_text("utf-8"))["measures"] if file.exists() else {}
        return found


def accuracies(measures: dict[str, Any], tasks: Iterable[str]) -> list[Accuracy]:
    """Accuracy of each task, and at last their average, whose standard error takes tasks as independent."""
    rows = [measures["tasks"]["model"]["tasks"][task] for task in tasks]
    found = [Accuracy(row["acc"], row.get("acc_stderr")) for row in rows]
    errors = [each.error for each in found if each.error is not None]
    error = sqrt(sum(each**2 for each in errors)) / len(found) if len(errors) == len(found) else None
    return [*found, Accuracy(fmean(each.value for each in found), error)]


def missing_text(commands: Commands, conversion: Conversion) -> Path | None:
    """The calibration file that a row needs and that is not there."""
    if conversion.calibration is None or Path(commands.text(conversion)).exists():
        return None
    return Path(commands.text(conversion))
