"""Checks that a result is of the layout that its report and its config speak of, and brings no foreign code."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from hcsmoe_hub.errors import VerificationError
from hcsmoe_hub.methods.clustering import DROPPED
from hcsmoe_hub.model.source_model import SourceModel
from hcsmoe_hub.options import Layout
from hcsmoe_hub.planning.mapped_layout import MODELING_FILE, auto_map, modeling_source
from hcsmoe_hub.report import REPORT_FILE


def experts_per_layer(model: SourceModel) -> int:
    """Experts that a checkpoint holds in the MoE layer that has most."""
    if model.expert_map is None:
        return model.settings.experts
    return max(max(row_map) + 1 for row_map in model.expert_map.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Claims:
    """What a report says about the layout of its checkpoint."""

    layout: Layout
    before: int
    after: int
    labels: Mapping[int, tuple[int, ...]]


def layout_of(model: SourceModel) -> Layout:
    """Layout of a checkpoint: a map shows in its config, copies of merged experts only in its report.

    Raises:
        VerificationError: If there is a report that cannot be read.
    """
    if model.expert_map is not None:
        return Layout.MAPPED
    is_full = REPORT_FILE in model.source.files() and _read_claims(model).layout is Layout.FULL
    return Layout.FULL if is_full else Layout.REDUCED


def _read_claims(model: SourceModel) -> _Claims:
    """Reads the report of a checkpoint.

    Raises:
        VerificationError: If it does not say what it has to.
    """
    try:
        report = json.loads(model.source.text(REPORT_FILE))
        if not report["layers"]:
            raise ValueError("no layers")
        return _Claims(
            # A report that names no layout is of the only one that there was at the time.
            layout=Layout(report.get("method", {}).get("layout", Layout.REDUCED)),
            before=report["experts"]["before"],
            after=report["experts"]["after"],
            labels={layer["layer"]: tuple(layer["labels"]) for layer in report["layers"]},
        )
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, ValueError):
        raise VerificationError(f"{REPORT_FILE} is no report of a conversion.", hint="convert again") from None


def check_report(model: SourceModel) -> None:
    """Checks the report of a conversion, if there is one, against the config.

    Raises:
        VerificationError: If they speak of different layouts, counts or clusters.
    """
    if REPORT_FILE not in model.source.files():
        return
    claims = _read_claims(model)
    if (claims.layout is Layout.MAPPED) != (model.expert_map is not None):
        kind = "no map" if model.expert_map is None else "a map"
        raise VerificationError(
            f"{REPORT_FILE} speaks of the layout {claims.layout}, but config.json has {kind} from router rows to "
            "experts.",
            hint="convert again",
        )
    if model.expert_map is not None and dict(model.expert_map) != claims.labels:
        raise VerificationError(
            f"the clusters in {REPORT_FILE} are not those that config.json maps router rows to.", hint="convert again"
        )
    # Only the reduced layout changes the count in the config.
    claimed = claims.after if claims.layout is Layout.REDUCED else claims.before
    if claimed != model.settings.experts:
        raise VerificationError(
            f"{REPORT_FILE} speaks of {claimed} experts, config.json of {model.settings.experts}.", hint="convert again"
        )
    counts = [len(set(labels) - {DROPPED}) for labels in claims.labels.values()]
    if not min(counts) <= claims.after <= max(counts):
        raise VerificationError(
            f"{REPORT_FILE} speaks of {claims.after} experts per layer, its own clusters of {min(counts)} to "
            f"{max(counts)}.",
            hint="convert again",
        )


def check_code(model: SourceModel) -> None:
    """Checks that a mapped result brings the code that loads it, and no other that would run along with it.

    Raises:
        VerificationError: If what it brings is not, byte for byte, what this version writes.
    """
    if model.expert_map is None:
        return
    source = model.source
    is_ours = MODELING_FILE in source.files() and source.fetch(MODELING_FILE).read_bytes() == (
        modeling_source(model).encode()
    )
    if not is_ours or source.config.get("auto_map") != auto_map(model):
        raise VerificationError(
            f"{MODELING_FILE} or auto_map of {source.label} is not what this version of hcsmoe writes, and foreign "
            "code is never run.",
            hint="convert again, or verify it with the version that made it",
        )
    if any(file.startswith("custom_generate/") for file in source.files()):
        raise VerificationError(
            f"{source.label} brings code of its own in custom_generate, and foreign code is never run.",
            hint="remove that folder",
        )
