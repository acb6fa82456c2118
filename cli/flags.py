"""The options of the command line that stand for the fields which messages of the library name."""

import re
from collections.abc import Mapping
from dataclasses import fields

from hcsmoe_hub.errors import OPTION
from hcsmoe_hub.evaluation.cost_options import CostOptions
from hcsmoe_hub.evaluation.options import EvaluateOptions
from hcsmoe_hub.options import CalibrationOptions, ConvertOptions, CurveOptions, MethodOptions, PushOptions, Target
from hcsmoe_hub.recovery.options import RecoverOptions

# Arguments of the library's functions that are options of commands as well.
_ARGUMENTS = frozenset({"base", "cache_dir", "revision", "token"})
_FIELDS = _ARGUMENTS.union(
    *(
        {field.name for field in fields(kind)}
        for kind in (
            CalibrationOptions,
            ConvertOptions,
            CostOptions,
            CurveOptions,
            EvaluateOptions,
            MethodOptions,
            PushOptions,
            RecoverOptions,
            Target,
        )
    )
)
# Where the option is not the field's name with dashes.
_NAMES: Mapping[str, str] = {
    "dataset": "--calibration",
    # What is on by default has an option that switches it off.
    "checkpoint": "--no-checkpoint",
    "keep_states": "--no-states",
    "measure": "--no-measure",
    "push": "--push-to",
    "repo_id": "--push-to",
    "timing": "--no-timing",
}


def flag(field: str) -> str:
    """The option that sets a field: ``--max-shard-size``."""
    return _NAMES.get(field, f"--{field.replace('_', '-')}")


def with_flags(text: str) -> str:
    """A message of the library with the options of the command line: ``--saliency reap``."""
    return OPTION.sub(_typed, text)


def _typed(match: re.Match[str]) -> str:
    field, value = match.groups()
    if field not in _FIELDS:
        return match[0]
    if value in (None, "True", "False"):
        return flag(field)
    # Tuples are typed as lists.
    return f"{flag(field)} {value.strip('()').replace(', ', ',').replace(chr(39), '')}"
