"""What an interrupted recovery and the one that goes on must have in common: everything that can change the bytes."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from hcsmoe_hub.calibration.sources import dataset_digest
from hcsmoe_hub.checkpoint.unfinished import WORK, Work
from hcsmoe_hub.machine import ranks
from hcsmoe_hub.machine.device import resolve_device
from hcsmoe_hub.machine.versions import installed_versions, tool
from hcsmoe_hub.pipeline.identity import plain
from hcsmoe_hub.recovery.models import Opened
from hcsmoe_hub.recovery.options import RecoverOptions
from hcsmoe_hub.result.make_report import describe_source

_HARMLESS = frozenset({"output", "overwrite", "restart", "device", "teacher", "teacher_logits", "top_logits"})


def asked(result: str | Path, options: RecoverOptions) -> dict[str, Any]:
    """What identifies a recovery before anything is opened, each item by the option that it comes from.

    Args:
        result: The result, as it was given.
        options: Of the recovery.
    """
    found: dict[str, Any] = {WORK: Work.RECOVERY.value, "result": str(result), "teacher": str(options.teacher)}
    given = {field.name: plain(getattr(options, field.name)) for field in fields(options)}
    found |= {name: value for name, value in given.items() if name not in _HARMLESS}
    # Where the logits are kept does not matter, but how many are.
    found["top_logits"] = None if options.teacher_logits is None else options.top_logits
    return found


def identity(result: str | Path, options: RecoverOptions, opened: Opened) -> dict[str, Any]:
    """What identifies the outcome of a recovery.

    Args:
        result: The result, as it was given.
        options: Of the recovery.
        opened: The result and its teacher.

    Returns:
        JSON.
    """
    found: Mapping[str, Any] = {
        **asked(result, options),
        "content of the result": describe_source(opened.result.source)["fingerprint"],
        "content of the teacher": describe_source(opened.teacher.source)["fingerprint"],
        "content of the text": dataset_digest(options.data),
        "kind of device": resolve_device(options.device).type,
        "number of processes": ranks.size(),
        "version of hcsmoe": tool()["version"],
    }
    return {**found, **{f"version of {name}": number for name, number in installed_versions().items()}}
