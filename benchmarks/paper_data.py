"""The tables of the HC-SMoE and M-SMoE papers, as ``paper_tables.json`` holds them, and what each row measures.

Figures are copied from the papers; which paper and which table is part of the data.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

FILE = Path(__file__).with_name("paper_tables.json")


class Conversion(NamedTuple):
    """One checkpoint of a table; rows of several tables may share it.

    Attributes:
        model: Name of the model in the data file.
        experts: Experts per layer, on average where layers differ.
        recipe: Name of the method in the data file; ``None`` for the source itself.
        calibration: File of calibration text; ``None`` for the usual text.
    """

    model: str
    experts: int
    recipe: str | None
    calibration: str | None = None

    @property
    def name(self) -> str:
        """Name of its folder."""
        parts = [self.model, str(self.experts), self.recipe, self.calibration and Path(self.calibration).stem]
        return "-".join(part for part in parts if part) if self.recipe else self.model


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row as the paper prints it.

    Attributes:
        method: What the paper calls it, in full.
        recipe: Name of the options that carry it out; ``None`` for the source itself.
        experts: Experts per layer.
        published: Accuracy of each task of the table, from 0 to 1.
        average: Their average as printed.
        calibration: File of calibration text; ``None`` for C4.
    """

    method: str
    recipe: str | None
    experts: int
    published: tuple[float, ...]
    average: float
    calibration: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table of a paper.

    Attributes:
        name: Paper and number.
        paper: Name of the paper in the data file.
        number: Number of the table in the paper.
        title: What it shows.
        model: Name of the model in the data file.
        tasks: Name of the group of tasks in the data file.
        rows: Its rows, in the order of the paper.
    """

    name: str
    paper: str
    number: int
    title: str
    model: str
    tasks: str
    rows: tuple[Row, ...]

    def conversion(self, row: Row) -> Conversion:
        """What a row measures."""
        return Conversion(self.model, row.experts, row.recipe, row.calibration)


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """The data file.

    Attributes:
        papers: ``title``, ``authors``, ``arxiv`` and ``text`` (where it appeared) of each paper.
        models: ``repository`` and number of ``experts`` of each model.
        columns: Title of each task of lm-eval.
        tasks: Groups of tasks.
        recipes: Options of ``hcsmoe convert`` for each method.
        tables: The tables that can be run.
        not_run: ``paper``, ``tables`` and ``reason`` of those that cannot.
    """

    papers: Mapping[str, Mapping[str, str]]
    models: Mapping[str, Mapping[str, Any]]
    columns: Mapping[str, str]
    tasks: Mapping[str, tuple[str, ...]]
    recipes: Mapping[str, str]
    tables: tuple[Table, ...]
    not_run: tuple[Mapping[str, str], ...]

    def conversions(self, tables: tuple[Table, ...]) -> Iterator[tuple[Table, Row, Conversion]]:
        """Every row of some tables, with what it measures."""
        return ((table, row, table.conversion(row)) for table in tables for row in table.rows)


def load(file: Path = FILE) -> Data:
    """Reads the data file."""
    found = json.loads(file.read_text("utf-8"))
    tables = tuple(
        Table(
            **{
                **table,
                "rows": tuple(Row(**{**row, "published": tuple(row["published"])}) for row in table["rows"]),
            }
        )
        for table in found["tables"]
    )
    groups = {name: tuple(tasks) for name, tasks in found["tasks"].items()}
    return Data(**{**found, "tables": tables, "tasks": groups, "not_run": tuple(found["not_run"])})
