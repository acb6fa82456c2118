"""The measured rows of ``quality.py``: figures as JSON, and the figures of every record next to them as ``.npz``."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Key(NamedTuple):
    """What was measured.

    Attributes:
        model: Name of the model.
        experts: Experts of the result; those of the model itself for the source.
        recipe: Name of the recipe, ``source`` for the source, ``time/N`` for the CPU time of the reference with N
            calibration sequences.
        seed: Seed of the method and of the calibration text.
        calibration: Calibration text, ``""`` for the source.
        absent: Domain that was left out of calibration and is the only one measured; ``""`` if none was.
    """

    model: str
    experts: int
    recipe: str
    seed: int
    calibration: str
    absent: str = ""

    def name(self, array: str) -> str:
        """Name of one of its arrays."""
        return "|".join(map(str, (*self, array)))


class Store:
    """Rows in the order in which they were measured, saved one by one so that an interrupted run can resume.

    Args:
        file: JSON file, with a ``.npz`` of the same name next to it. It may not exist yet.
        settings: What all rows have in common; ``None`` takes those of the file.

    Raises:
        SystemExit: If the file holds rows of other settings.
    """

    def __init__(self, file: Path, settings: Mapping[str, Any] | None = None) -> None:
        self._file, self._arrays_file = file, file.with_suffix(".npz")
        self.settings: dict[str, Any] = dict(settings or {})
        self.rows: dict[Key, dict[str, Any]] = {}
        self._arrays: dict[str, Array] = {}
        if not file.exists():
            return
        content = json.loads(file.read_text("utf-8"))
        if settings is not None and content["settings"] != self.settings:
            raise SystemExit(f"{file} was measured with {content['settings']}; choose another --json file.")
        self.settings = content["settings"]
        with np.load(self._arrays_file) as arrays:
            self._arrays = dict(arrays)
        for row in content["rows"]:
            figures = row.pop("figures")
            self.rows[Key(**row)] = figures

    def array(self, key: Key, name: str) -> Array:
        """One of the arrays of a row."""
        return self._arrays[key.name(name)]

    def add(self, key: Key, figures: dict[str, Any], arrays: Mapping[str, Array]) -> None:
        """Adds a row and saves all; what was saved before stays whole if this is interrupted."""
        self.rows[key] = figures
        self._arrays |= {key.name(name): array for name, array in arrays.items()}
        partial = self._arrays_file.with_suffix(".partial.npz")
        np.savez_compressed(partial, allow_pickle=False, **self._arrays)
        os.replace(partial, self._arrays_file)
        rows = [key._asdict() | {"figures": figures} for key, figures in self.rows.items()]
        lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        partial = self._file.with_suffix(".partial.json")
        partial.write_text(f'{{\n "settings": {json.dumps(self.settings)},\n "rows": [\n{lines}\n ]\n}}\n', "utf-8")
        os.replace(partial, self._file)
