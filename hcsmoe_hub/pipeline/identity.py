"""What an interrupted conversion and the one that goes on must have in common: everything that can change the bytes."""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.machine import ranks
from hcsmoe_hub.machine.device import resolve_device
from hcsmoe_hub.machine.versions import installed_versions, tool
from hcsmoe_hub.planning.conversion_plan import ConversionPlan
from hcsmoe_hub.result.make_report import describe_source

STATISTICS = "content of the statistics"
# Options that say how a conversion works, not what comes out.
_HARMLESS = frozenset({"push", "low_disk", "max_memory", "overwrite", "restart", "checkpoint", "output", "device"})
_NESTED = frozenset({"calibration", "method", "target"})


def identity(plan: ConversionPlan) -> dict[str, Any]:
    """What identifies the result of a plan, each item by the option that it comes from or by what it is.

    Args:
        plan: The conversion.

    Returns:
        JSON.
    """
    options, source = plan.options, plan.model.source
    described = describe_source(source)
    found: dict[str, Any] = {"source": source.label, "content of the source": described["fingerprint"]}
    for field in fields(options):
        value = getattr(options, field.name)
        if field.name in _NESTED:
            found |= {} if value is None else _items(value, found)
        elif field.name not in _HARMLESS:
            found[field.name] = plain(value)
    found[STATISTICS] = None if plan.statistics is None else plan.statistics.digest
    found["choices of the other conversion"] = None if plan.like is None else plain(plan.like.record)
    found["batch_tokens"] = plan.batch_tokens
    found["device"] = resolve_device(options.device).type
    found["number of processes"] = ranks.size()
    found["version of hcsmoe"] = tool()["version"]
    return found | {f"version of {name}": number for name, number in installed_versions().items()}


def _items(options: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of nested options; both the text and the method have a seed."""
    items = {field.name: plain(getattr(options, field.name)) for field in fields(options)}
    return {name: value if found.get(name, value) == value else [found[name], value] for name, value in items.items()}


def plain(value: Any) -> Any:
    """A value as JSON holds it."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    return str(value)


def check_identity(
    before: Mapping[str, Any], now: Mapping[str, Any], output: Path, *, kind: str = "conversion"
) -> None:
    """Checks that a conversion would end in the bytes that an interrupted one began.

    Args:
        before: Identity of the interrupted one.
        now: Identity of this one.
        output: The output folder.
        kind: What messages call it.

    Raises:
        PlanError: If they differ; names the first item that does, with both values.
    """
    for name in (*now, *(name for name in before if name not in now)):
        if before.get(name) != now.get(name):
            raise PlanError(
                f"{output} holds an interrupted {kind} with another {_words(name)}: "
                f"{_shown(before.get(name))}, not {_shown(now.get(name))}.",
                hint="use the same options to go on with it, or add `restart=True` to begin anew",
                option=name if name in now and " " not in name and name != "source" else None,
            )


def _words(name: str) -> str:
    return name if " " in name or name == "source" else f"`{name}`"


def _shown(value: Any) -> str:
    return "none" if value is None else json.dumps(value) if isinstance(value, list | dict) else str(value)
