"""Shrink Mixture-of-Experts checkpoints without fine-tuning: prune or merge experts, refit the rest, write the result.

Importing this package is cheap: torch and the other libraries are imported when work begins.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# These modules are imported here because each has the name of its function, which must win.
from hcsmoe_hub.convert import convert, execute, plan
from hcsmoe_hub.curve import curve
from hcsmoe_hub.errors import (
    CalibrationError,
    HcsmoeError,
    OutOfMemoryError,
    OutputError,
    PlanError,
    SourceError,
    UnsupportedModelError,
    VerificationError,
)
from hcsmoe_hub.evaluation.options import EvaluateOptions
from hcsmoe_hub.options import (
    Align,
    AlignTo,
    Budget,
    CalibrationOptions,
    Clustering,
    ConvertOptions,
    CurveOptions,
    Device,
    Distance,
    Dominant,
    Features,
    KMeansStart,
    Layout,
    Linkage,
    Merge,
    Method,
    MethodOptions,
    Preset,
    Propagate,
    PushOptions,
    Refit,
    RouterPolicy,
    Saliency,
    Similarity,
    Target,
)
from hcsmoe_hub.push import push
from hcsmoe_hub.recover import RecoveryReport, recover
from hcsmoe_hub.recovery.options import Precision, RecoverOptions, Train
from hcsmoe_hub.report import ConversionReport, Pushed
from hcsmoe_hub.report.curve import CurveReport

if TYPE_CHECKING:
    from hcsmoe_hub.evaluation.evaluate import evaluate
    from hcsmoe_hub.hub.write_errors import PushError
    from hcsmoe_hub.model_cards import WrittenCard, write_card
    from hcsmoe_hub.planning.conversion_plan import ConversionPlan
    from hcsmoe_hub.result.verify import Verification, verify

    __version__: str

# Names whose modules import large libraries, and the module of each.
_LAZY = {
    "ConversionPlan": "hcsmoe_hub.planning.conversion_plan",
    "PushError": "hcsmoe_hub.hub.write_errors",
    "Verification": "hcsmoe_hub.result.verify",
    "WrittenCard": "hcsmoe_hub.model_cards",
    "evaluate": "hcsmoe_hub.evaluation.evaluate",
    "verify": "hcsmoe_hub.result.verify",
    "write_card": "hcsmoe_hub.model_cards",
}

__all__ = [
    "Align",
    "AlignTo",
    "Budget",
    "CalibrationError",
    "CalibrationOptions",
    "Clustering",
    "ConversionPlan",
    "ConversionReport",
    "ConvertOptions",
    "CurveOptions",
    "CurveReport",
    "Device",
    "Distance",
    "Dominant",
    "EvaluateOptions",
    "Features",
    "HcsmoeError",
    "KMeansStart",
    "Layout",
    "Linkage",
    "Merge",
    "Method",
    "MethodOptions",
    "OutOfMemoryError",
    "OutputError",
    "PlanError",
    "Precision",
    "Preset",
    "Propagate",
    "PushError",
    "PushOptions",
    "Pushed",
    "RecoverOptions",
    "RecoveryReport",
    "Refit",
    "RouterPolicy",
    "Saliency",
    "Similarity",
    "SourceError",
    "Target",
    "Train",
    "UnsupportedModelError",
    "Verification",
    "VerificationError",
    "WrittenCard",
    "__version__",
    "convert",
    "curve",
    "evaluate",
    "execute",
    "plan",
    "push",
    "recover",
    "verify",
    "write_card",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("hcsmoe")
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
