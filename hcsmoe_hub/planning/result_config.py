"""The config of a result, and the models without weights that it describes."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hcsmoe_hub.checkpoint import config_json
from hcsmoe_hub.checkpoint.config_json import MoESettings
from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.model.architectures import REPORT_HINT
from hcsmoe_hub.model.skeleton import Skeleton
from hcsmoe_hub.model.source_model import SourceModel
from hcsmoe_hub.planning.expert_shape import ExpertShape
from hcsmoe_hub.planning.factored_layout import build_factored, factor_sizes, factored_config, with_factors
from hcsmoe_hub.planning.tensor_fates import Account
from hcsmoe_hub.recipe.recipe import Recipe


def _edited_config(
    model: SourceModel, after: MoESettings, shape: ExpertShape, *, without_mtp: bool = False, keep_format: bool = True
) -> dict[str, Any]:
    edited = config_json.edit(
        model.source.config,
        model.skeleton.text_config,
        model.settings,
        after,
        without_mtp=without_mtp,
        # Settings that are left over from another checkpoint describe no tensor.
        without_quantization=not (model.is_quantized and keep_format),
    )
    return edited if shape.narrowed is None else shape.narrowed.edit(edited, shape.width)


def result_config(
    model: SourceModel, after: MoESettings, shape: ExpertShape, account: Account, factored: Skeleton | None
) -> dict[str, Any]:
    """``config.json`` of the result, but for what the mapped layout adds at the end."""
    config = _edited_config(model, after, shape, without_mtp=bool(account.dropped), keep_format=account.keeps_format)
    return config if factored is None else with_factors(config, model, factored)


def reduced_skeleton(
    model: SourceModel, state: Mapping[str, Tensor], after: MoESettings, shape: ExpertShape
) -> Skeleton:
    """The result as a model without weights, its experts of whole matrices.

    Raises:
        PlanError: If its tensors are not those of the result.
    """
    reduced = Skeleton(_edited_config(model, after, shape), model.skeleton.dtype, mtp=model.skeleton.mtp)
    _check_reduced(model, reduced, state, after)
    return reduced


def factored_skeleton(model: SourceModel, recipe: Recipe, after: MoESettings, shape: ExpertShape) -> Skeleton | None:
    """The result as a model without weights whose experts are factors; ``None`` if their matrices stay whole."""
    if recipe.compression is None:
        return None
    sizes = factor_sizes(model, recipe.compression)
    return build_factored(factored_config(_edited_config(model, after, shape), model, sizes), model)


def _check_reduced(model: SourceModel, reduced: Skeleton, state: Mapping[str, Tensor], after: MoESettings) -> None:
    """Checks that the edited config describes exactly the tensors that the conversion will produce."""
    is_same_top_k = model.settings.experts_per_token == after.experts_per_token
    for name, tensor in state.items():
        found = list(reduced.state[name].shape) if name in reduced.state else "no tensor at all"
        if found != list(tensor.shape):
            raise PlanError(
                f"with {after.experts} experts and {after.experts_per_token} per token the model would need {found} "
                f"for {name}, the conversion makes {list(tensor.shape)}.",
                hint=REPORT_HINT if is_same_top_k else "keep `experts_per_token` as it is",
            )
