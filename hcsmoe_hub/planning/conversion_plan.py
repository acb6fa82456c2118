"""What a conversion will do, decided before a weight is read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hcsmoe_hub.calibration.plan import CalibrationPlan
from hcsmoe_hub.checkpoint.config_json import MoESettings
from hcsmoe_hub.checkpoint.pieces import Step, reading_order
from hcsmoe_hub.checkpoint.writer import ShardLayout
from hcsmoe_hub.model.skeleton import Skeleton
from hcsmoe_hub.model.source_model import SourceModel
from hcsmoe_hub.observation.statistics_file import StatisticsFile
from hcsmoe_hub.options import ConvertOptions, Dtype
from hcsmoe_hub.planning.tensor_fates import Account
from hcsmoe_hub.recipe.recipe import Recipe


@dataclass(slots=True, kw_only=True)
class ConversionPlan:
    """Everything that a conversion will do, decided before it starts.

    Attributes:
        model: The source.
        options: The options as they were given.
        recipe: Every choice of the method in force.
        settings: Expert counts in the config of the result.
        experts_by_layer: Experts that each MoE layer will have left. Where the budget depends on statistics that nobody
            has collected yet, the average.
        is_final: Whether ``experts_by_layer`` is more than the average.
        state: Parameters and buffers of the result on the meta device.
        reduced: The result as a model without weights, if it is one of fewer experts and router rows.
        account: What becomes of every stored tensor.
        shards: Where every tensor of the result will lie.
        config: ``config.json`` of the result, but for what the mapped layout adds.
        sidecars: Files that are copied byte for byte.
        left_files: Reasons by the names of the other files, which stay behind.
        calibration: What the experts are observed on.
        feature_tokens: Tokens of every layer that are kept for methods that look at single tokens.
        statistics: Statistics of an earlier run that take the place of running the model.
        on_device: Whether layers run on an accelerator.
        batch_tokens: Tokens per micro-batch.
        output: Folder of the result.
        warnings: Where the user's wish was bent, or a second look is due.
    """

    model: SourceModel
    options: ConvertOptions
    recipe: Recipe
    settings: MoESettings
    experts_by_layer: dict[int, int]
    is_final: bool
    state: dict[str, Tensor]
    reduced: Skeleton | None
    account: Account
    shards: ShardLayout
    config: dict[str, Any]
    sidecars: list[str]
    left_files: dict[str, str]
    calibration: CalibrationPlan
    feature_tokens: int
    statistics: StatisticsFile | None
    on_device: bool
    batch_tokens: int
    output: Path
    warnings: list[str]

    @property
    def keeps_format(self) -> bool:
        """Whether the result is quantised, in the format of the source."""
        return self.model.is_quantized and self.options.dtype is Dtype.SOURCE

    @property
    def sends_away(self) -> bool:
        """Whether the result does not stay on this machine."""
        return self.options.low_disk and self.options.push is not None

    @property
    def trains_model(self) -> bool:
        """Whether the whole reduced model is trained on its source's logits; it is not if it has as many experts."""
        return self.recipe.refits_model and self.options.experts < self.model.settings.experts

    @property
    def method(self) -> dict[str, Any]:
        """Every choice in force, as reports record it: the recipe, and the format of a quantised source's weights."""
        dtype = {"dtype": str(self.options.dtype)} if self.model.is_quantized else {}
        return {**self.recipe.as_dict(), **dtype}

    @property
    def observing_order(self) -> list[Step]:
        """Tensors that are read together by a pass which only runs the model."""
        return reading_order(self.model.stored_keys, self.model.source.tensors)

    @property
    def reading_order(self) -> list[Step]:
        """Tensors that are read together by the pass that converts."""
        return reading_order(
            self.model.stored_keys, self.model.source.tensors, self.model.parts_of(self.account.unread)
        )

    @property
    def parameters_after(self) -> int:
        """Parameters of all that the result stores, shared ones counted once."""
        unused = self.model.placement.unused
        return self.model.count(self.state, (name for name in unused if name not in self.account.dropped))
