"""The commands that make and measure a row of a table, as words without ``hcsmoe``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from paper_data import Conversion, Data

from hcsmoe_hub.evaluation.tasks import GROUPS
from hcsmoe_hub.report import EVALUATION_FILE


@dataclass(frozen=True, slots=True, kw_only=True)
class Commands:
    """Commands for the rows of the data file.

    Attributes:
        data: The data file.
        sources: Folder or repository of a model, where it is not the one in the data file.
        folder: Where results go; ``None`` for the current folder.
        calibration: What rows calibrate on unless they name a file of their own.
        texts: Folder of the files that rows name; ``None`` for the current folder.
        samples: Sequences of calibration text; ``None`` for the default of ``hcsmoe convert``, which is the paper's.
        measures: Options of ``hcsmoe evaluate``; empty for the tasks of the row's table.
        limit: Questions of each task; ``None`` for all.
    """

    data: Data
    sources: Mapping[str, str] = field(default_factory=dict)
    folder: Path | None = None
    calibration: str = "c4"
    texts: Path | None = None
    samples: int | None = None
    measures: Sequence[str] = ()
    limit: int | None = None

    def source(self, model: str) -> str:
        """Folder or repository of a model."""
        return self.sources.get(model, str(self.data.models[model]["repository"]))

    def result(self, conversion: Conversion) -> Path:
        """Folder of a result; its name has the number of sequences, so that a trial is never taken for more."""
        suffix = "" if self.samples is None else f"-{self.samples}-sequences"
        return self._place(conversion.name + suffix)

    def figures(self, conversion: Conversion) -> Path:
        """File that the measures of a checkpoint are in."""
        if conversion.recipe is None:
            return self._place(f"{conversion.name}.json")
        return self.result(conversion) / EVALUATION_FILE

    def text(self, conversion: Conversion) -> str:
        """Calibration text of a conversion."""
        name = conversion.calibration
        if name is None:
            return self.calibration
        return name if self.texts is None else str(self.texts / name)

    def convert(self, conversion: Conversion) -> list[str]:
        """Words of a conversion; conversions of one model on one text share their statistics."""
        assert conversion.recipe is not None, "a source is not converted"
        text = self.text(conversion)
        suffix = "" if self.samples is None else f"-{self.samples}"
        statistics = self._place(f"{conversion.model}-{Path(text).stem}{suffix}.stats")
        return [
            *("convert", self.source(conversion.model), "--experts", str(conversion.experts)),
            *self.data.recipes[conversion.recipe].split(),
            *("--calibration", text, *([] if self.samples is None else ["--samples", str(self.samples)])),
            *("--statistics", str(statistics), "--no-states", "--output", str(self.result(conversion))),
        ]

    def evaluate(self, conversion: Conversion, group: str) -> list[str]:
        """Words of an evaluation on a group of tasks, or on what ``measures`` names."""
        tasks = ["--tasks", group if group in GROUPS else ",".join(self.data.tasks[group])]
        limit = [] if self.limit is None else ["--limit", str(self.limit)]
        words = [*(self.measures or tasks), *limit]
        if conversion.recipe is None:
            return ["evaluate", self.source(conversion.model), *words, "--output", str(self.figures(conversion))]
        return ["evaluate", str(self.result(conversion)), *words]

    def _place(self, name: str) -> Path:
        return Path(name) if self.folder is None else self.folder / name
