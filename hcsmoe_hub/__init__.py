"""hcsmoe: fewer experts for Sparse-Mixture-of-Experts checkpoints, without training."""

from hcsmoe_hub.convert import convert, execute, plan_conversion
from hcsmoe_hub.errors import HcsmoeError
from hcsmoe_hub.options import CalibrationOptions, ConvertOptions, MethodOptions, PushOptions
from hcsmoe_hub.recipe.presets import Preset, method_options
from hcsmoe_hub.report import Pushed

__all__ = [
    "CalibrationOptions",
    "ConvertOptions",
    "HcsmoeError",
    "MethodOptions",
    "Preset",
    "PushOptions",
    "Pushed",
    "convert",
    "execute",
    "method_options",
    "plan_conversion",
]
