"""What a conversion did: the content of ``hcsmoe.json``, and the names of the files next to the weights."""

from hcsmoe_hub.report.files import BENCHMARK_FILE, CARD_FILE, EVALUATION_FILE, FIGURE_FILE, REPORT_FILE
from hcsmoe_hub.report.paths import strip_paths
from hcsmoe_hub.report.schema import (
    SCHEMA_VERSION,
    CalibrationRecord,
    CalibrationSource,
    Change,
    ConversionReport,
    ExpertCounts,
    LayerReport,
    MethodRecord,
    Pushed,
    RefitReport,
    RouterReport,
    SourceRecord,
    Tool,
)

__all__ = [
    "BENCHMARK_FILE",
    "CARD_FILE",
    "EVALUATION_FILE",
    "FIGURE_FILE",
    "REPORT_FILE",
    "SCHEMA_VERSION",
    "CalibrationRecord",
    "CalibrationSource",
    "Change",
    "ConversionReport",
    "ExpertCounts",
    "LayerReport",
    "MethodRecord",
    "Pushed",
    "RefitReport",
    "RouterReport",
    "SourceRecord",
    "Tool",
    "strip_paths",
]
