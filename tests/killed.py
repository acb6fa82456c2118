"""Converts in forked processes that kill themselves at chosen events, all from one that has imported everything.

Run: python killed.py SOURCE IDS FOLDER PRESET, and a JSON list on standard input, one item per conversion: the events
at which the runs that come one after another end, such as ``["convert 1", "verify started"]``. A last run finishes
each conversion. Results are in ``FOLDER/0/result``, ``FOLDER/1/result`` and so on; prints, as JSON, the layers that
each run of each conversion has converted.
"""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch

from hcsmoe_hub import CalibrationOptions, ConvertOptions, MethodOptions, convert, plan
from hcsmoe_hub.cli.libraries import prepare_libraries
from hcsmoe_hub.events import Event, Stage, StageAdvanced, StageFinished, StageStarted
from hcsmoe_hub.options import Preset


def name_of(event: Event, layers: list[str]) -> str:
    """What an event is called here; the layers that are done are counted."""
    match event:
        case StageStarted(stage):
            return f"{stage} started"
        case StageFinished(stage):
            return f"{stage} finished"
        case StageAdvanced(Stage.CONVERT, detail):
            layers.append(detail)
            return f"convert {detail.removeprefix('layer ')}"
    return ""


def run(source: str, options: ConvertOptions, end: str | None) -> list[str]:
    """One run in a process of its own; the layers that it has converted."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        layers: list[str] = []

        def listen(event: Event) -> None:
            if name_of(event, layers) == end:
                os.write(writing, json.dumps(layers).encode())
                os.kill(os.getpid(), signal.SIGKILL)

        convert(source, options, listener=listen)
        os.write(writing, json.dumps(layers).encode())
        os._exit(0)
    os.close(writing)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reading) as pipe:
        found: list[str] = json.loads(pipe.read() or "[]")
    if os.WIFSIGNALED(status) != (end is not None):
        raise SystemExit(f"The run that was to end at {end!r} ended with the status {status}.")
    return found


def _import_everything(source: str, options: ConvertOptions) -> None:
    """Imports what a conversion imports when it begins, so that no run has to."""
    import hcsmoe_hub.model_cards
    import hcsmoe_hub.pipeline.run
    import hcsmoe_hub.result.verify  # noqa: F401

    plan(source, options)


def main() -> None:
    source, ids, folder, preset = sys.argv[1:]
    prepare_libraries()
    torch.set_num_threads(1)
    options = ConvertOptions(
        experts=4,
        method=MethodOptions(preset=Preset(preset)),
        calibration=CalibrationOptions(dataset=ids),
        max_shard_size="40KB",
        output=Path(folder),
        device="cpu",
    )
    _import_everything(source, options)
    found = []
    for number, ends in enumerate(json.load(sys.stdin)):
        # Named alike, as the card has the name of the folder.
        own = replace(options, output=Path(folder, str(number), "result"))
        found.append([run(source, own, end) for end in (*ends, None)])
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
