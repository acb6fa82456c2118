"""Conversions that are interrupted at some event, and what tests compare of their results."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hcsmoe_hub import convert
from hcsmoe_hub.events import Event, Stage, StageAdvanced, StageResumed
from hcsmoe_hub.options import ConvertOptions

UNFINISHED = "hcsmoe.incomplete"


class InterruptedHere(Exception):
    """What ends a conversion in the middle."""


def at_layer(layer: int, stage: Stage = Stage.CONVERT) -> Callable[[Event], bool]:
    """The moment at which a layer is through, but has not been kept yet."""
    return lambda event: isinstance(event, StageAdvanced) and event.stage is stage and event.detail == f"layer {layer}"


def interrupt(source: Path, wanted: ConvertOptions, is_then: Callable[[Event], bool]) -> None:
    """Converts up to some event."""

    def listen(event: Event) -> None:
        if is_then(event):
            raise InterruptedHere

    with pytest.raises(InterruptedHere):
        convert(source, wanted, listener=listen)


def go_on(source: Path, wanted: ConvertOptions) -> dict[Stage, int]:
    """Converts to the end; returns the layers that were not done again, by stage."""
    resumed: dict[Stage, int] = {}

    def listen(event: Event) -> None:
        if isinstance(event, StageResumed):
            resumed[event.stage] = event.done

    convert(source, wanted, listener=listen)
    return resumed


def comparable(folder: Path) -> dict[str, Any]:
    """Every file of a result, but for what depends on the machine and on the moment."""
    found: dict[str, Any] = {}
    for file in sorted(folder.rglob("*")):
        if not file.is_file():
            continue
        name = file.relative_to(folder).as_posix()
        found[name] = file.read_bytes()
        if name == "hcsmoe.json":
            report = json.loads(found[name])
            # Times and memory are those of the machine; their names are not.
            report["timings_seconds"] = sorted(report["timings_seconds"])
            report["peak_memory_bytes"] = sorted(report["peak_memory_bytes"])
            found[name] = report
        elif name == "README.md":
            # What a run took, and the digest of the text around it.
            found[name] = re.sub(r"\*\*Run\*\*: .*?;|hcsmoe:card \w+", "", found[name].decode())
    return found


def undisturbed(source: Path, wanted: ConvertOptions) -> dict[str, Any]:
    """What a conversion that nothing interrupts writes, to a folder of the same name."""
    assert wanted.output is not None
    output = wanted.output.parent / "undisturbed" / wanted.output.name
    convert(source, replace(wanted, output=output))
    return comparable(output)
