"""What a conversion did: the content of ``hcsmoe.json``, and the names of the files next to the weights."""

from hcsmoe_hub.report.files import BENCHMARK_FILE, CARD_FILE, EVALUATION_FILE, FIGURE_FILE, REPORT_FILE
from hcsmoe_hub.report.paths import strip_paths
from hcsmoe_hub.report.schema import (
    SCHEMA_VERSION,
    Change,
    ConversionReport,
    DomainDivergence,
    ErrorChange,
    ExpertCounts,
    LayerReport,
    MethodRecord,
    ModelRefitReport,
    Pushed,
    RefitReport,
    RouterReport,
    SourceRecord,
    Tool,
)
from hcsmoe_hub.report.texts import CalibrationDomain, CalibrationRecord, CalibrationSource, Measured, MeasuredRow

__all__ = [
    "BENCHMARK_FILE",
    "CARD_FILE",
    "EVALUATION_FILE",
    "FIGURE_FILE",
    "REPORT_FILE",
    "SCHEMA_VERSION",
    "CalibrationDomain",
    "CalibrationRecord",
    "CalibrationSource",
    "Change",
    "ConversionReport",
    "DomainDivergence",
    "ErrorChange",
    "ExpertCounts",
    "LayerReport",
    "Measured",
    "MeasuredRow",
    "MethodRecord",
    "ModelRefitReport",
    "Pushed",
    "RefitReport",
    "RouterReport",
    "SourceRecord",
    "Tool",
    "strip_paths",
]
