"""Reads ``hcsmoe.json`` of a result; what an older version did not write yet is left open."""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from hcsmoe_hub.cli.method_words import method_line
from hcsmoe_hub.cli.summary import calibration_line
from hcsmoe_hub.cli.tables import Document
from hcsmoe_hub.errors import SourceError
from hcsmoe_hub.report import REPORT_FILE, SCHEMA_VERSION, upgrade

if TYPE_CHECKING:
    from hcsmoe_hub.checkpoint.source import Source

NUMBER = (int, float)
GREATEST = 1e300


@dataclass(frozen=True, slots=True, kw_only=True)
class RefitResult:
    """A refit of one layer; the attributes are those of ``RefitReport``."""

    is_kept: bool
    error_before: float
    error_after: float
    rounds: int | None
    steps: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerResult:
    """One MoE layer of a result; the attributes are those of ``LayerReport``."""

    layer: int
    labels: list[int]
    dominant: list[int]
    usage: list[int]
    merge_heights: list[float]
    tree: list[list[float]] | None
    silhouette: float | None
    dunn: float | None
    policy: str
    top_k_agreement: float
    is_fitted: bool | None
    top_k_agreement_before: float | None
    refit: RefitResult | None
    output_error: float

    @property
    def dead_experts(self) -> list[int]:
        """Source experts that no calibration token was routed to."""
        return [expert for expert, count in enumerate(self.usage) if count == 0]

    def members(self) -> list[list[int]]:
        """Source experts of every cluster."""
        members: list[list[int]] = [[] for _ in self.dominant]
        for expert, label in enumerate(self.labels):
            if label >= 0:
                members[label].append(expert)
        return members


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a report says about a conversion.

    Attributes:
        document: The report as it was written.
        origin: Source of the conversion.
        tool: Name and version of the program.
        method: The method in words.
        calibration: The calibration set in words.
        layers: The MoE layers.
    """

    document: Document
    origin: str
    tool: str
    method: str
    calibration: str
    layers: list[LayerResult]


def read_result(source: "Source") -> Result | None:
    """What the report of a source says; ``None`` if it holds no report.

    Raises:
        SourceError: If the report is damaged, or of a version that this program does not read.
    """
    if REPORT_FILE not in source.files():
        return None
    where = f"{source.label}/{REPORT_FILE}"
    try:
        document = json.loads(source.text(REPORT_FILE), parse_constant=_refuse)
        document = upgrade(document)
        version = document["schema_version"]
        if version == SCHEMA_VERSION:
            return _result(document)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise SourceError(
            f"{where} is damaged: {_words(error)}.", hint="download it again, or repeat the conversion"
        ) from error
    raise SourceError(
        f"{where} has schema version {version!r}; this program reads {SCHEMA_VERSION}.", hint="use a newer hcsmoe"
    )


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number of JSON")


def _words(error: Exception) -> str:
    match error:
        case KeyError():
            return f"{error.args[0]} is missing"
        case json.JSONDecodeError():
            return f"it is no JSON ({error})"
        case _:
            return str(error)


def _result(document: Any) -> Result:
    source = document["source"]
    revision = source.get("revision")
    name = _value(source.get("repo_id") or source["path"], str)
    return Result(
        document=document,
        origin=f"{name} @ {revision[:7]}" if revision else name,
        tool=" ".join(_value(document["tool"][key], str) for key in ("name", "version")),
        method=method_line(document["method"]),
        calibration=calibration_line(document["calibration"]),
        layers=[_layer(layer) for layer in _value(document["layers"], list)],
    )


def _layer(content: Any) -> LayerResult:
    labels, dominant, usage = (_numbers(content[key], int) for key in ("labels", "dominant", "usage"))
    if not dominant or min(dominant) < 0:
        raise ValueError(f"layer {content['layer']} has no experts left")
    if len(usage) != len(labels) or [labels[expert] for expert in dominant] != list(range(len(dominant))):
        raise ValueError(f"layer {content['layer']} has labels, dominant experts and usage that contradict each other")
    if not all(-1 <= label < len(dominant) for label in labels):
        raise ValueError(f"layer {content['layer']} has labels of clusters that it does not have")
    return LayerResult(
        layer=_value(content["layer"], int),
        labels=labels,
        dominant=dominant,
        usage=usage,
        merge_heights=_numbers(content["merge_heights"], NUMBER),
        tree=None if content.get("tree") is None else _tree(content["tree"], len(labels)),
        silhouette=_optional(content.get("silhouette")),
        dunn=_optional(content.get("dunn")),
        policy=_value(content["router"]["policy"], str),
        top_k_agreement=_value(content["router"]["top_k_agreement"], NUMBER),
        is_fitted=_flag(content["router"].get("is_fitted")),
        top_k_agreement_before=_optional(content["router"].get("top_k_agreement_before")),
        refit=_refit(content.get("refit")),
        output_error=_value(content["output_error"], NUMBER),
    )


def _refit(content: Any) -> RefitResult | None:
    if content is None:
        return None
    rounds, steps = (content.get(key) for key in ("rounds", "steps"))
    return RefitResult(
        is_kept=_flag(content["is_kept"]) is True,
        error_before=_value(content["error_before"], NUMBER),
        error_after=_value(content["error_after"], NUMBER),
        rounds=None if rounds is None else _value(rounds, int),
        steps=None if steps is None else _value(steps, int),
    )


def _value(value: Any, kind: Any) -> Any:
    # JSON allows numbers that no float can hold.
    is_endless = isinstance(value, NUMBER) and not abs(value) < GREATEST
    if not isinstance(value, kind) or isinstance(value, bool) or is_endless:
        raise TypeError(f"{value!r} is out of place")
    return value


def _numbers(values: Any, kind: Any) -> Any:
    return [_value(value, kind) for value in _value(values, list)]


def _optional(value: Any) -> float | None:
    return None if value is None else float(_value(value, NUMBER))


def _flag(value: Any) -> bool | None:
    if value is not None and not isinstance(value, bool):
        raise TypeError(f"{value!r} is out of place")
    return value


def _tree(rows: Any, leaves: int) -> list[list[float]]:
    """The merges, every node of which is made once before it is merged once."""
    tree = [_numbers(row, NUMBER) for row in _value(rows, list)]
    children = [row[side] for row in tree for side in (0, 1)]
    heights = [row[2] for row in tree]
    is_ordered = all(max(row[:2]) < leaves + number for number, row in enumerate(tree)) and heights == sorted(heights)
    if len(tree) != leaves - 1 or sorted(children) != list(range(2 * leaves - 2)) or not is_ordered:
        raise ValueError(f"a tree of {len(tree)} merges does not join {leaves} experts")
    if heights and heights[0] < 0:
        raise ValueError(f"a merge has the height {heights[0]}")
    return [[float(value) for value in row[:3]] for row in tree]
