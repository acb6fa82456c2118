"""Reads ``hcsmoe.json``, of this schema version and of the one before."""

from typing import Any

from hcsmoe_hub.errors import SourceError
from hcsmoe_hub.report.layers import LayerReport
from hcsmoe_hub.report.recovery import RecoveryRecord
from hcsmoe_hub.report.schema import SCHEMA_VERSION, ConversionReport, MethodRecord
from hcsmoe_hub.report.texts import Measured
from hcsmoe_hub.report.validate import conform, parse_json

# JSON allows numbers that no float can hold.
_GREATEST = 1e300


def read_report(text: str, *, label: str) -> ConversionReport:
    """Reads the text of a report.

    Args:
        text: Content of ``hcsmoe.json``.
        label: What messages call the file.

    Returns:
        The report in the words of this version. What version 1 did not record yet is ``None``.

    Raises:
        SourceError: If the report is damaged, or of a version that this program does not read.
    """
    try:
        content = parse_json(text)
        if "schema_version" not in content:
            raise ValueError("schema_version is missing")
        version = content["schema_version"]
        if version in (1, SCHEMA_VERSION):
            report = conform(_upgraded(content) if version == 1 else content, ConversionReport)
            _check(report)
            return report
    except ValueError as error:
        raise SourceError(
            f"{label} is damaged: {error}.", hint="download it again, or repeat the conversion"
        ) from error
    raise SourceError(
        f"{label} has schema version {version!r}, and this version of hcsmoe reads 1 to {SCHEMA_VERSION}.",
        hint="use a newer hcsmoe",
    )


def _upgraded(content: dict[str, Any]) -> dict[str, Any]:
    """A report of version 1 in the words of this one; the first reports recorded less.

    Version 1 called a refit a correction, and the frequency that finds a dominant expert its usage.

    Raises:
        ValueError: If a part is of another kind.
    """
    method, calibration = (_part(content, name, dict) for name in ("method", "calibration"))
    renamed = {{"correct": "refit"}.get(key, key): value for key, value in method.items()}
    if renamed.get("dominant") == "usage":
        renamed["dominant"] = "frequency"
    defaults = {"method": "merge", "budget": "uniform", "layout": "reduced", "seed": calibration.get("seed")}
    return {
        **content,
        "schema_version": SCHEMA_VERSION,
        "method": {**dict.fromkeys(MethodRecord.__annotations__), **defaults, **renamed},
        "calibration": {"dataset_sha256": None, **calibration},
        "layers": [_upgraded_layer(layer) for layer in _part(content, "layers", list)],
    }


def _part(content: dict[str, Any], name: str, kind: type[Any]) -> Any:
    if name not in content:
        raise ValueError(f"{name} is missing")
    if not isinstance(content[name], kind):
        raise ValueError(f"{name} is not {'a list' if kind is list else 'an object'}")
    return content[name]


def _upgraded_layer(layer: Any) -> Any:
    if not isinstance(layer, dict):
        return layer
    dominant, usage = layer.get("dominant"), layer.get("usage")
    derived: dict[str, Any] = {}
    if isinstance(dominant, list) and isinstance(usage, list):
        unused = [expert for expert, count in enumerate(usage) if count == 0]
        derived = {"experts": len(dominant), "dead_experts": unused}
    refit = layer.get("correction", layer.get("refit"))
    if isinstance(refit, dict):
        refit = {**dict.fromkeys(("fitted_tokens", "held_out_tokens", "rounds")), **refit}
    absent = dict.fromkeys(("routing_score", "tree", "silhouette", "dunn", "measured_tokens"))
    return {**absent, **derived, **layer, "refit": refit}


def _check(report: ConversionReport) -> None:
    """Checks that the parts of a report agree with each other.

    Raises:
        ValueError: If they do not.
    """
    if not report.layers:
        raise ValueError("layers is empty")
    if report.measured is not None:
        _check_measured(report.measured)
    if report.recovery is not None:
        _check_recovery(report.recovery)
    for number, layer in enumerate(report.layers):
        where = f"layers[{number}]"
        clusters = len(layer.dominant)
        if not clusters:
            raise ValueError(f"{where}.dominant is empty, so no expert would be left")
        if not all(-1 <= label < clusters for label in layer.labels):
            raise ValueError(f"{where}.labels names clusters that are not in {where}.dominant")
        is_led = all(0 <= expert < len(layer.labels) for expert in layer.dominant)
        if not is_led or [layer.labels[expert] for expert in layer.dominant] != list(range(clusters)):
            raise ValueError(f"{where}.labels and {where}.dominant contradict each other")
        if len(layer.usage) != len(layer.labels) or layer.experts != clusters:
            raise ValueError(f"{where}.labels contradicts its usage or its number of experts")
        _check_numbers(layer, where)
        if layer.tree is not None:
            _check_tree(layer.tree, len(layer.labels), f"{where}.tree")


def _check_measured(measured: Measured) -> None:
    rows = {"overall": measured["overall"], **{f"domains.{name}": row for name, row in measured["domains"].items()}}
    for name, row in rows.items():
        where = f"measured.{name}"
        if row["tokens"] < 1:
            raise ValueError(f"{where}.tokens is {row['tokens']}, so nothing was measured")
        figures = (row["perplexity_before"], row["perplexity_after"], row["ratio"])
        if not all(0 < figure < _GREATEST for figure in figures):
            raise ValueError(f"{where} has a perplexity or a ratio that is not a positive number")
        if not 0 <= row["top1_agreement"] <= 1:
            raise ValueError(f"{where}.top1_agreement is {row['top1_agreement']}, not between 0 and 1")


def _check_recovery(recovery: RecoveryRecord) -> None:
    for name, score in (("before", recovery["before"]), ("after", recovery["after"])):
        if not 0 < score["perplexity"] < _GREATEST or not abs(score["kl"]) < _GREATEST:
            raise ValueError(f"recovery.{name} has a figure that no training can have")
    if not 0 <= recovery["kept_step"] <= recovery["steps"]:
        raise ValueError(f"recovery.kept_step is {recovery['kept_step']} of {recovery['steps']} steps")
    if not recovery["settings"]["train"]:
        raise ValueError("recovery.settings.train is empty, so nothing was trained")
    if recovery["data"]["sequence_length"] < 1:
        raise ValueError(f"recovery.data.sequence_length is {recovery['data']['sequence_length']}")


def _check_numbers(layer: LayerReport, where: str) -> None:
    values = {"output_error": layer.output_error, "silhouette": layer.silhouette, "dunn": layer.dunn}
    for name, value in values.items():
        if value is not None and not abs(value) < _GREATEST:
            raise ValueError(f"{where}.{name} is too large for a number")


def _check_tree(tree: list[list[float]], leaves: int, where: str) -> None:
    """Checks that every node of a dendrogram is made once before it is merged once."""
    if not all(len(row) >= 3 for row in tree):
        raise ValueError(f"{where} has a merge that is not [left, right, height]")
    children = [row[side] for row in tree for side in (0, 1)]
    heights = [row[2] for row in tree]
    is_ordered = all(max(row[:2]) < leaves + number for number, row in enumerate(tree)) and heights == sorted(heights)
    if len(tree) != leaves - 1 or sorted(children) != list(range(2 * leaves - 2)) or not is_ordered:
        raise ValueError(f"{where} with its {len(tree)} merges does not join {leaves} experts")
    if heights and heights[0] < 0:
        raise ValueError(f"{where} has a merge at the height {heights[0]}")
