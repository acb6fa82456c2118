"""Whether the choices of another conversion fit a model: it must be a sister of the model that they were made on."""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from transformers import PreTrainedConfig

from hcsmoe_hub.errors import PlanError, SourceError
from hcsmoe_hub.machine.units import format_numbers
from hcsmoe_hub.methods.merging import NeuronOrigins
from hcsmoe_hub.model.model_class import build_config
from hcsmoe_hub.model.raw_config import translated_errors
from hcsmoe_hub.model.source_model import SourceModel
from hcsmoe_hub.model.width import neurons_of
from hcsmoe_hub.options import Merge
from hcsmoe_hub.planning.like import Like
from hcsmoe_hub.planning.neuron_file import read_neuron_file
from hcsmoe_hub.report import NEURONS_FILE

# Names that sizes of feed-forward networks have.
_WIDTH = re.compile(r"intermediate|ffn|inner")


def fit_like(like: Like, model: SourceModel) -> Like:
    """Checks that another conversion's choices fit a model, and reads its neurons.

    Args:
        like: The other conversion.
        model: What its choices are applied to.

    Returns:
        The same with its neurons.

    Raises:
        PlanError: If the model has another shape than the one that the choices were made on.
        SourceError: If the file of its neurons is damaged.
    """
    for what, theirs, ours in _shapes(like, model):
        if theirs != ours:
            raise PlanError(
                f"the choices of {like.label} were made on a model with {what} {theirs}, but {model.source.label} has "
                f"{ours}.",
                hint="use a result of a model with the same architecture and sizes with `like`",
            )
    ahead = sorted({block.layer for block in model.blocks} - {layer.layer for layer in like.report.layers})
    if ahead:
        raise PlanError(
            f"{like.label} has no choices for layer {ahead[0]} of {model.source.label}, its MTP head.",
            hint="use `mtp='drop'`",
        )
    origins = _origins(like)
    return replace(like, origins=origins, record={**like.record, "neurons": bool(origins)})


def like_notes(like: Like) -> list[str]:
    """What a plan says of choices that are not at hand."""
    chose = like.recipe.merge is Merge.NEURONS or "width_after" in like.report.experts
    if not chose or like.neurons is not None:
        return []
    return [
        f"{like.label} has no {NEURONS_FILE}: its choice of experts is applied, but the neurons of each are chosen "
        "anew on the calibration text."
    ]


def _shapes(like: Like, model: SourceModel) -> Iterator[tuple[str, Any, Any]]:
    """Names of sizes, and what each is in the model of the choices and in this one."""
    report, settings = like.report, model.settings
    yield "model_type", report.source["model_type"], model.source.config["model_type"]
    yield "experts per layer:", report.experts["before"], settings.experts
    yield "active experts per token:", report.experts["per_token_before"], settings.experts_per_token
    theirs = [layer.layer for layer in report.layers[: report.experts["moe_layers"]]]
    yield "the MoE layers", format_numbers(theirs), format_numbers([block.layer for block in model.decoder_blocks])
    if like.config is not None:
        with translated_errors(like.label):
            built = build_config(like.config).get_text_config()
        ours = model.skeleton.text_config
        yield "num_hidden_layers", _size(built, "num_hidden_layers"), _size(ours, "num_hidden_layers")
        yield "hidden_size", _size(built, "hidden_size"), _size(ours, "hidden_size")
        for name in vars(ours) if "width_after" not in report.experts else ():
            if _WIDTH.search(name) and isinstance(_size(ours, name), int):
                yield name, _size(built, name), _size(ours, name)
    width = report.experts.get("width_before")
    if width is None and report.neurons is not None:
        width = report.neurons["before"]
    if width is not None:
        yield "neurons per expert:", width, neurons_of(model)


def _size(config: PreTrainedConfig, name: str) -> Any:
    return getattr(config, name, None)


def _origins(like: Like) -> dict[int, NeuronOrigins]:
    """The neurons of all layers, where they are recorded.

    Raises:
        SourceError: If their file is damaged.
    """
    if like.neurons is None or like.report.neurons is None:
        return {}
    try:
        return read_neuron_file(like.neurons, like.report.neurons, like.report)
    except ValueError as error:
        raise SourceError(
            f"{NEURONS_FILE} of {like.label} is damaged: {error}.", hint="download it again, or repeat the conversion"
        ) from error
