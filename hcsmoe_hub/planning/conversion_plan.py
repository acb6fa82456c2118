"""What a conversion will do, decided before a weight is read."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from hcsmoe_hub.calibration.calibration_set import CalibrationSet
from hcsmoe_hub.calibration.plan import CalibrationPlan
from hcsmoe_hub.checkpoint.config_json import MoESettings
from hcsmoe_hub.checkpoint.modeling_hcsmoe_factored import FactorSizes
from hcsmoe_hub.checkpoint.pieces import Step, reading_order
from hcsmoe_hub.checkpoint.unfinished import staging
from hcsmoe_hub.checkpoint.writer import ShardLayout
from hcsmoe_hub.model.skeleton import Skeleton
from hcsmoe_hub.model.source_model import SourceModel
from hcsmoe_hub.model.width import neurons_of
from hcsmoe_hub.observation.statistics_file import StatisticsFile
from hcsmoe_hub.observation.wanted import Wanted
from hcsmoe_hub.options import ConvertOptions, Dtype, Saliency, Similarity
from hcsmoe_hub.planning.expert_shape import ExpertShape
from hcsmoe_hub.planning.like import Like
from hcsmoe_hub.planning.target import TargetPlan
from hcsmoe_hub.planning.tensor_fates import Account
from hcsmoe_hub.recipe.recipe import Recipe
from hcsmoe_hub.report import ExpertCounts


@dataclass(slots=True, kw_only=True)
class ConversionPlan:
    """Everything that a conversion will do, decided before it starts.

    Attributes:
        model: The source.
        options: The options as they were given.
        recipe: Every choice of the method in force.
        settings: Expert counts in the config of the result.
        shape: Number and width of its experts; where a budget gives each layer its own number, the average.
        experts_by_layer: Experts that each MoE layer will have left. Where the budget depends on statistics that nobody
            has collected yet, the average.
        target: What the result may weigh, and the shapes that meet it; ``None`` where its shape was given.
        is_final: Whether ``experts_by_layer`` is more than the average, and ``shape`` more than one of several that
            meet a target.
        state: Parameters and buffers of the result on the meta device; of factored experts, the matrices before.
        reduced: The result as a model without weights, if it is one of fewer experts and router rows; its experts have
            whole matrices.
        factored: The result as a model without weights, if the matrices of its experts are factors.
        account: What becomes of every stored tensor.
        shards: Where every tensor of the result will lie.
        config: ``config.json`` of the result, but for what the mapped layout adds at the end.
        sidecars: Files that are copied byte for byte.
        left_files: Reasons by the names of the other files, which stay behind.
        calibration: What the experts are observed on.
        feature_tokens: Tokens in the sample of every layer, for methods that look at single tokens.
        statistics: Statistics of an earlier run.
        like: Another conversion whose choices are applied.
        keeps_states_on_device: Whether hidden states of all sequences stay on the accelerator between layers.
        experts_on_host: Whether experts of a layer wait on the host for their turn, as the accelerator is too small.
        device_room: Bytes of the accelerator that layers may use; ``None`` where they run on the host.
        batch_tokens: Tokens per micro-batch.
        output: Folder of the result.
        warnings: Where the user's wish was bent, or a second look is due.
    """

    model: SourceModel
    options: ConvertOptions
    recipe: Recipe
    settings: MoESettings
    shape: ExpertShape
    target: TargetPlan | None
    experts_by_layer: dict[int, int]
    is_final: bool
    state: dict[str, Tensor]
    reduced: Skeleton | None
    factored: Skeleton | None
    account: Account
    shards: ShardLayout
    config: dict[str, Any]
    sidecars: list[str]
    left_files: dict[str, str]
    calibration: CalibrationPlan
    feature_tokens: int
    statistics: StatisticsFile | None
    device_room: int | None
    batch_tokens: int
    output: Path
    warnings: list[str]
    like: Like | None = None
    keeps_states_on_device: bool = False
    experts_on_host: bool = False

    def split_as(self, calibration: CalibrationSet | None) -> "ConversionPlan":
        """The plan with the split between encoder and decoder that the text turned out to have.

        Args:
            calibration: The calibration set; ``None`` where a statistics file has none.
        """
        if calibration is None or calibration.source_length in (0, self.calibration.source_length):
            return self
        return replace(self, calibration=replace(self.calibration, source_length=calibration.source_length))

    @property
    def staging(self) -> Path:
        """Folder of the files of the result until it is complete."""
        return staging(self.output)

    @property
    def on_device(self) -> bool:
        """Whether layers run on an accelerator."""
        return self.device_room is not None

    @property
    def needs_mean_outputs(self) -> bool:
        """Whether experts are compared by their mean outputs: not if another conversion has compared them."""
        return self.like is None and self.recipe.needs_mean_outputs

    @property
    def needs_gram(self) -> bool:
        """Whether experts are kept by the products of their outputs: not if another conversion has chosen them."""
        return self.like is None and self.recipe.needs_gram

    @property
    def wanted(self) -> Wanted:
        """What is observed of every layer besides what reports show, where no statistics file is written."""
        recipe, is_choosing = self.recipe, self.is_choosing
        compares_logits = Similarity.ROUTER_LOGITS in (recipe.similarity or ())
        reconstructs = recipe.saliency is Saliency.RECONSTRUCTION
        # Those that only choose a shape convert nothing, and other choices than those of the recipe need no scores.
        chooses = self.like is None and not is_choosing
        return Wanted(
            outputs=self.needs_mean_outputs and not is_choosing,
            products=self.needs_gram and not is_choosing,
            logits=compares_logits and chooses,
            sums=recipe.saliency in (Saliency.MAN, Saliency.TOTAL_MASS) and chooses,
            sample=not is_choosing and (recipe.needs_sample or (reconstructs and self.like is None)),
        )

    @property
    def experts(self) -> int:
        """K, the experts that every MoE layer keeps; where a budget gives each its own number, the average."""
        return self.shape.experts

    @property
    def width(self) -> int:
        """W, the neurons of every expert of the result."""
        return self.shape.width

    @property
    def is_narrower(self) -> bool:
        """Whether experts of the result have fewer neurons than those of the source."""
        return self.shape.narrowed is not None

    @property
    def kept_share(self) -> float:
        """Parameters of the result's routed experts over those of the source's, 0 to 1."""
        return self.experts * self.width / (self.model.settings.experts * neurons_of(self.model))

    @property
    def stored_state(self) -> Mapping[str, Tensor]:
        """Parameters and buffers of the result as it is stored: the state, with factors in place of matrices."""
        return self.state if self.factored is None else self.factored.state

    @property
    def factors(self) -> FactorSizes | None:
        """Sizes of the factors that the experts of the result become; ``None`` where their matrices stay whole."""
        return None if self.factored is None else self.factored.factors

    @property
    def is_choosing(self) -> bool:
        """Whether several shapes meet a target, and nobody has observed yet which of them loses least."""
        return self.target is not None and self.target.chosen is None

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
        """Whether the whole reduced model is trained on its source's logits; it is not if its experts are all there."""
        return self.recipe.refits_model and (self.is_narrower or self.experts < self.model.settings.experts)

    @property
    def works_on_tokens(self) -> bool:
        """Whether the result depends on all tokens of the text one by one, not only on sums over them and a sample."""
        recipe = self.recipe
        return recipe.refits or recipe.fits_router or recipe.needs_energies or self.is_narrower

    @property
    def runs_source(self) -> bool:
        """Whether the calibration sequences run through the layers of the source."""
        if self.statistics is None:
            return True
        return self.works_on_tokens and self.statistics.has_text and not self.statistics.has_states

    @property
    def writes_statistics(self) -> bool:
        """Whether the conversion writes the statistics file that the options name."""
        return self.options.statistics is not None and self.statistics is None

    @property
    def keeps_states(self) -> bool:
        """Whether that file holds hidden states."""
        return self.writes_statistics and self.options.keep_states

    @property
    def expert_counts(self) -> ExpertCounts:
        """Experts, active experts and layers, before and after; widths where experts are narrower."""
        counts: dict[str, int] = {
            "before": self.model.settings.experts,
            "after": self.experts,
            "per_token_before": self.model.settings.experts_per_token,
            "per_token_after": self.settings.experts_per_token,
            **self.model.layer_counts,
        }
        if self.is_narrower:
            counts |= {"width_before": neurons_of(self.model), "width_after": self.width}
        return cast(ExpertCounts, counts)

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
        return self.model.count(self.stored_state, (name for name in unused if name not in self.account.dropped))
