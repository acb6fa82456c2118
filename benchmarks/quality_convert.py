"""Converts once for ``quality.py``, in a process of its own, so that its CPU time and its memory are its own.

Run: python benchmarks/quality_convert.py < REQUEST

The request is a JSON object: ``source``, ``output``, ``experts``, ``method`` and ``calibration`` with the fields of
``MethodOptions`` and ``CalibrationOptions``, and ``text``, which multiplies the number of sequences of the plan. The
last line of the output is a JSON object with the costs, or with the message of a refusal as ``refused``.
"""

import json
import resource
import sys
import tempfile
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from hcsmoe_hub import CalibrationOptions, ConvertOptions, HcsmoeError, MethodOptions, Preset, execute, plan
from hcsmoe_hub.checkpoint.source import Source
from hcsmoe_hub.hub.open import open_source


def cpu_seconds() -> float:
    """User and system time of this process so far, all threads together."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def warm_up(options: ConvertOptions, source: Source) -> None:
    """Converts with one sequence of other text, so that every library is loaded before anything is timed."""
    text = str(files("hcsmoe_hub.calibration") / "data" / "bundled.jsonl")
    with tempfile.TemporaryDirectory() as folder:
        method = MethodOptions(preset=Preset.HC_SMOE)
        calibration = CalibrationOptions(dataset=text, samples=1)
        execute(plan(source, replace(options, method=method, calibration=calibration, output=Path(folder) / "result")))


def converted(wanted: dict[str, Any]) -> dict[str, Any]:
    """Carries a request out.

    Returns:
        ``cpu_seconds`` of the conversion from its plan on, with all libraries loaded, ``loading_cpu_seconds`` of what
        came before, and ``peak_memory_bytes`` of the process; or ``refused``.
    """
    try:
        options = ConvertOptions(
            experts=wanted["experts"],
            method=MethodOptions(**wanted["method"]),
            calibration=CalibrationOptions(**wanted["calibration"]),
            output=Path(wanted["output"]),
            measure=False,
            device="cpu",
        )
        source = open_source(wanted["source"])
        warm_up(options, source)
        begin = cpu_seconds()
        planned = plan(source, options)
        if wanted["text"] != 1:
            samples = wanted["text"] * planned.calibration.sequences
            planned = plan(source, replace(options, calibration=replace(options.calibration, samples=samples)))
        execute(planned)
    except HcsmoeError as error:
        return {"refused": error.message}
    costs = {"cpu_seconds": round(cpu_seconds() - begin, 2), "loading_cpu_seconds": round(begin, 2)}
    # Linux counts in KiB.
    return costs | {"peak_memory_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


if __name__ == "__main__":
    print(json.dumps(converted(json.load(sys.stdin))))
