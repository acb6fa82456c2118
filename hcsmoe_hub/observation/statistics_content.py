"""What a statistics file must say, and what its tensors must be: somebody else may have written it."""

import math
from collections.abc import Mapping
from typing import Any, NotRequired

import torch
from torch import Tensor

# Pydantic takes those of Python itself from 3.12 on.
from typing_extensions import TypedDict

from hcsmoe_hub.calibration.plan import CalibrationPlan
from hcsmoe_hub.report.texts import CalibrationRecord
from hcsmoe_hub.report.validate import conform

_STATES_DTYPES = frozenset({"float64", "float32", "float16", "bfloat16"})
# Far beyond every model.
_MOST_LAYERS = 10_000


class _Options(TypedDict):
    dataset: str
    samples: int | None
    sequence_length: int | None
    source_length: NotRequired[int | None]
    text_column: str | None
    feature_tokens: int


class _Text(TypedDict):
    domains: list[str]
    measured_domains: list[str]
    sources: list[int]


class _Content(TypedDict):
    fingerprint: str
    source: str
    options: _Options
    plan: CalibrationPlan
    calibration: CalibrationRecord
    layers: list[int]
    mtp_layers: NotRequired[list[int]]
    text: NotRequired[_Text]
    states_dtype: NotRequired[str | None]


def check_content(content: Mapping[str, Any]) -> None:
    """Checks the kind of every value that is used, and that they agree.

    Raises:
        ValueError: If one is missing, of another kind, or out of range; says which.
    """
    found = conform(dict(content), _Content)
    layers, dtype = found["layers"], found.get("states_dtype")
    if not layers or len(set(layers)) < len(layers) or not all(0 <= layer < _MOST_LAYERS for layer in layers):
        raise ValueError("layers is not a list of different numbers")
    if dtype is not None and dtype not in _STATES_DTYPES:
        raise ValueError(f"states_dtype is {dtype!r}")
    plan, record = found["plan"], found["calibration"]
    counts = {
        "plan.sequences": plan.sequences,
        "plan.sequence_length": plan.sequence_length,
        "calibration.sequences": record["sequences"],
        "calibration.tokens": record["tokens"],
        "options.feature_tokens": found["options"]["feature_tokens"],
    }
    for name, count in counts.items():
        if not 0 < count < 2**53:
            raise ValueError(f"{name} is {count}")
    if not 0 <= plan.source_length < plan.sequence_length:
        raise ValueError(f"plan.source_length is {plan.source_length}, of {plan.sequence_length} tokens")
    if record.get("source_length", 0) != plan.source_length:
        raise ValueError(f"calibration.source_length is not {plan.source_length}, as in the plan")


def check_layer(tensors: Mapping[str, Tensor], experts: int | None) -> None:
    """Checks the sums of one MoE layer: ``[E]``, ``[E, E]`` or ``[E, H]`` by the ends of their names.

    Args:
        tensors: The sums by name; ``usage_E`` is among them.
        experts: E, ``None`` if it is not known.

    Raises:
        ValueError: If one is of another shape or kind, or holds something that is not a number.
    """
    experts = tensors["usage_E"].numel() if experts is None else experts
    for name, tensor in tensors.items():
        shape = {"E": (experts,), "EE": (experts, experts)}.get(name.rpartition("_")[2])
        fits = tuple(tensor.shape) == shape if shape is not None else tensor.dim() == 2 and len(tensor) == experts
        is_number = tensor.dtype == torch.int64 if name == "usage_E" else tensor.dtype.is_floating_point
        if not fits or not is_number or tensor.dtype.itemsize < 4:
            raise ValueError(f"{name} is {tensor.dtype} of shape {list(tensor.shape)}")
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds values that are not finite")
    if int(tensors["usage_E"].min()) < 0:
        raise ValueError("usage_E holds negative counts")


def check_text(tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> None:
    """Checks the token ids against what is said of them.

    Raises:
        ValueError: If they are of another shape or kind, or there are more or fewer than described.
    """
    text = content["text"]
    for name, domains in (("token_ids", text["domains"]), ("measured_ids", text["measured_domains"])):
        ids = tensors.get(name)
        if ids is None or ids.dtype != torch.int64 or ids.dim() != 2 or len(ids) != len(domains):
            raise ValueError(f"{name} does not hold {len(domains)} sequences")
        if ids.numel() and int(ids.min()) < 0:
            raise ValueError(f"{name} holds negative ids")
    length = content["calibration"]["sequence_length"]
    if tensors["token_ids"].shape[1] != length or not len(tensors["token_ids"]):
        raise ValueError(f"token_ids does not hold sequences of {length} tokens")
    if text["sources"] and len(text["sources"]) != len(text["domains"]):
        raise ValueError("sources does not name one for every sequence")


def check_losses(experts: Tensor, widths: Tensor, lost_KW: Tensor) -> None:
    """Checks a table of what fewer and narrower experts lose.

    Raises:
        ValueError: If its parts do not fit each other.
    """
    for axis in (experts, widths):
        if axis.dtype != torch.int64 or axis.dim() != 1:
            raise ValueError("an axis is not a list of whole numbers")
    is_table = lost_KW.dim() == 2 and tuple(lost_KW.shape) == (len(experts), len(widths))
    if not is_table or not lost_KW.dtype.is_floating_point or lost_KW.dtype.itemsize < 4:
        raise ValueError(f"the table is {lost_KW.dtype} of shape {list(lost_KW.shape)}")
    if not math.isfinite(float(lost_KW.double().abs().sum())):
        raise ValueError("the table holds values that are not finite")
