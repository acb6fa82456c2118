"""What a conversion knows about a layer that it has converted, as it is kept for a run that goes on from there."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from hcsmoe_hub.layer.picture import LayerPicture
from hcsmoe_hub.layer.reducer import LayerReducer
from hcsmoe_hub.layer.spectra import Spectra
from hcsmoe_hub.methods.merging import NeuronOrigins
from hcsmoe_hub.report import report_of


def kept_layer(reducer: LayerReducer, layer: int) -> dict[str, Any]:
    """What a reducer knows about the layer that it has converted last; empty for a layer without a block.

    Args:
        reducer: The reducer.
        layer: Index of the layer.

    Returns:
        Numbers, texts, arrays and tensors, inside lists and dicts.
    """
    if not reducer.reports or reducer.reports[-1].layer != layer:
        return {}
    found: dict[str, Any] = {"report": asdict(reducer.reports[-1])}
    if reducer.pictures and reducer.pictures[-1].layer == layer:
        found["picture"] = _fields(reducer.pictures[-1])
    if layer in reducer.spectra:
        found["spectra"] = _fields(reducer.spectra[layer])
    if layer in reducer.origins:
        found["origins"] = _fields(reducer.origins[layer])
    return found


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in fields(value)}


def restore_layer(reducer: LayerReducer, layer: int, kept: Mapping[str, Any]) -> None:
    """Lets a reducer know about a layer that an interrupted run has converted; layers are restored in order.

    Args:
        reducer: The reducer.
        layer: Index of the layer.
        kept: What ``kept_layer`` returned.
    """
    if "report" in kept:
        reducer.reports.append(report_of(kept["report"]))
    if "picture" in kept:
        reducer.pictures.append(LayerPicture(**kept["picture"]))
    if "spectra" in kept:
        reducer.spectra[layer] = Spectra(**kept["spectra"])
    if "origins" in kept:
        reducer.origins[layer] = NeuronOrigins(**kept["origins"])
