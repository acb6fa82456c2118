"""Puts together the report of a conversion: what was converted, how, and what came out."""

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hcsmoe_hub.calibration.calibration_set import CalibrationSet
from hcsmoe_hub.calibration.plan import CalibrationPlan
from hcsmoe_hub.calibration.sources import dataset_digest, dataset_name, source_digest
from hcsmoe_hub.calibration.token_ids import fingerprint as token_fingerprint
from hcsmoe_hub.checkpoint.source import Source
from hcsmoe_hub.errors import SourceError
from hcsmoe_hub.events import Listener, Warned
from hcsmoe_hub.machine.versions import installed_versions, tool
from hcsmoe_hub.observation.statistics_file import fingerprint
from hcsmoe_hub.observation.statistics_writer import StatisticsWriter
from hcsmoe_hub.planning.conversion_plan import ConversionPlan
from hcsmoe_hub.planning.sizes import active_parameter_counts, compression_record, parameter_counts, weight_bytes
from hcsmoe_hub.report import (
    CalibrationDomain,
    CalibrationRecord,
    CalibrationSource,
    ConversionReport,
    LayerReport,
    Measured,
    strip_paths,
)
from hcsmoe_hub.result.source_card import inherit_from


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came out of a conversion.

    Attributes:
        layers: One report per MoE layer.
        measured: What it cost; ``None`` if that was not measured.
        not_measured: Why it was not measured; ``None`` if it was.
    """

    layers: list[LayerReport]
    measured: Measured | None
    not_measured: str | None


def describe_making(plan: ConversionPlan, calibration: CalibrationSet | None, emit: Listener) -> dict[str, Any]:
    """The part of a report that is known before the conversion, and that two conversions with the same result share.

    Args:
        plan: The conversion.
        calibration: What the model is run on; ``None`` where a statistics file has no text.
        emit: Receives a warning if the card of the source cannot be read.
    """
    source = plan.model.source
    described = {**describe_source(source), "model_type": source.config["model_type"]}
    return {
        "tool": tool(),
        "source": {**described, **_inherited(source, emit)},
        "experts": plan.expert_counts,
        "method": plan.method,
        "calibration": calibration_record(plan, calibration),
        "like": None if plan.like is None else plan.like.record,
    }


def _inherited(source: Source, emit: Listener) -> dict[str, Any]:
    """What the card of a source says of licence and use; one that cannot be read must not cost the result."""
    try:
        return inherit_from(source)
    except SourceError as error:
        emit(Warned(f"{error.message} The licence of the source is not recorded."))
        return {"gated": bool(source.gated)}


def make_report(
    plan: ConversionPlan,
    making: Mapping[str, Any],
    outcome: Outcome,
    *,
    warnings: list[str],
    seconds: dict[str, float],
    peak: dict[str, int],
) -> ConversionReport:
    """The report of a conversion.

    Args:
        plan: The conversion.
        making: What was known before, from ``describe_making``.
        outcome: What came out.
        warnings: Warnings of the run; paths on this machine are shortened to names.
        seconds: Time of each stage.
        peak: Peak memory in bytes, by device.
    """
    source = plan.model.source
    dataset = plan.options.calibration.dataset
    names = {str(source.path): source.name, dataset: dataset_name(dataset)}
    return ConversionReport(
        **making,
        parameters=parameter_counts(plan),
        active_parameters=active_parameter_counts(plan),
        weights_bytes=weight_bytes(plan),
        measured=outcome.measured,
        not_measured=outcome.not_measured,
        layers=outcome.layers,
        compression=compression_record(plan),
        dropped_tensors=plan.account.dropped,
        left_files=plan.left_files,
        warnings=[strip_paths(message, names) for message in warnings],
        timings_seconds=seconds,
        peak_memory_bytes=peak,
        versions=installed_versions(),
        target=None if plan.target is None else plan.target.record(),
    )


def calibration_record(plan: ConversionPlan, calibration: CalibrationSet | None) -> CalibrationRecord:
    """What the model was run on, as reports record it; taken from the plan's statistics if it has some.

    Args:
        plan: The conversion.
        calibration: The loaded set, ``None`` where a statistics file has none.
    """
    if plan.statistics is not None:
        recorded: CalibrationRecord = plan.statistics.content["calibration"]
        return recorded
    assert calibration is not None, "without statistics the model runs"
    sequences, length = calibration.token_ids.shape
    record: CalibrationRecord = {
        "dataset": dataset_name(plan.calibration.dataset),
        "sequences": sequences,
        "sequence_length": length,
        "tokens": sequences * length,
        "seed": plan.calibration.seed,
        "text_column": plan.calibration.text_column,
        "feature_tokens": plan.feature_tokens,
        "sha256": token_fingerprint(calibration.token_ids),
        "dataset_sha256": dataset_digest(plan.calibration.dataset),
        "domains": domain_records(calibration),
    }
    if calibration.source_length:
        record["source_length"] = calibration.source_length
        record["is_split"] = plan.calibration.is_split
    if len(plan.calibration.sources) > 1:
        record["sources"] = _source_records(plan.calibration, calibration)
    return record


def domain_records(calibration: CalibrationSet) -> list[CalibrationDomain]:
    """The domains of a calibration set, in the order in which they appear."""
    counts, measured = Counter(calibration.domains), Counter(calibration.measured_domains)
    length = calibration.token_ids.shape[1]
    return [
        {
            "domain": domain,
            "sequences": count,
            "tokens": count * length,
            "measured_tokens": measured[domain] * length,
        }
        for domain, count in counts.items()
    ]


def _source_records(plan: CalibrationPlan, calibration: CalibrationSet) -> list[CalibrationSource]:
    """What each source contributed to a calibration set of several."""
    counts = Counter(calibration.sources)
    return [
        {
            "dataset": source.name,
            "share": source.share,
            "sequences": counts[index],
            "tokens": counts[index] * plan.sequence_length,
            "domain": source.domain,
            "sha256": source_digest(source),
        }
        for index, source in enumerate(plan.sources)
    ]


def describe_source(source: Source) -> dict[str, Any]:
    """Identifies a checkpoint as reports do: they are published, so a folder is named without its path.

    Args:
        source: The checkpoint.

    Returns:
        ``repo_id``, or ``path`` with the name of the folder; ``revision``; and ``fingerprint``, the SHA-256 of a
        repository's name and commit, or of a folder's config, tensor headers and first bytes of each tensor.
    """
    if source.repo_id is not None and source.revision is not None:
        digest = hashlib.sha256(f"{source.repo_id}@{source.revision}".encode()).hexdigest()
        return {"repo_id": source.repo_id, "revision": source.revision, "fingerprint": digest}
    return {"path": source.name, "revision": None, "fingerprint": source.fingerprint(source.tensors.values())}


def describe(writer: StatisticsWriter, plan: ConversionPlan, calibration: CalibrationSet) -> str:
    """Writes what the statistics of a run were collected on; returns what ``StatisticsFile.digest`` will be."""
    name = {"dataset": dataset_name(plan.calibration.dataset)}
    return writer.describe(
        {
            "fingerprint": fingerprint(plan.model),
            "source": plan.model.source.repo_id or plan.model.source.name,
            "options": {**asdict(plan.options.calibration), **name},
            "plan": {**asdict(plan.calibration), **name},
            "calibration": calibration_record(plan, calibration),
            "layers": [block.layer for block in plan.model.blocks],
            "mtp_layers": [block.layer for block in plan.model.blocks[len(plan.model.decoder_blocks) :]],
            "text": {
                "domains": calibration.domains,
                "measured_domains": calibration.measured_domains,
                "sources": calibration.sources,
            },
            "states_dtype": str(plan.model.skeleton.dtype).removeprefix("torch.") if plan.keeps_states else None,
        }
    )
