"""Everything that a card is drawn from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from hcsmoe_hub.evaluation.measures import Checkpoint, Measures
from hcsmoe_hub.machine.units import format_plural
from hcsmoe_hub.options import Layout, Method
from hcsmoe_hub.recipe.recipe import Recipe
from hcsmoe_hub.report import ConversionReport, LayerReport, ModelRefitReport, RefitReport, SourceRecord
from hcsmoe_hub.result.source_card import Inherited


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The model that a result was made from.

    Attributes:
        repo_id: Its repository, ``None`` if it was a folder.
        name: The repository, or the folder without its path.
        revision: Commit of the repository.
        fingerprint: Identifies its weights, also among checkpoints of the same name.
        model_type: As in its config.
    """

    repo_id: str | None
    name: str
    revision: str | None
    fingerprint: str | None
    model_type: str

    @property
    def url(self) -> str | None:
        """Page of the repository at that commit."""
        if self.repo_id is None:
            return None
        page = f"https://huggingface.co/{self.repo_id}"
        return page if self.revision is None else f"{page}/tree/{self.revision}"

    @property
    def link(self) -> str:
        """Name for Markdown."""
        return f"`{self.name}`" if self.url is None else f"[{self.name}]({self.url})"


@dataclass(frozen=True, slots=True, kw_only=True)
class CardData:
    """What is known of a result.

    Attributes:
        folder_name: Name of its folder.
        repo_id: Repository that it is, or will be, in; ``None`` if that is not known.
        report: ``hcsmoe.json``.
        recipe: Every choice in force.
        base: What it was made from.
        inherited: What it inherits from the card of its base.
        config: ``config.json``.
        files: Names of the files in its folder.
        tensors: Names of its tensors; empty if there is no index.
        measures: What was measured of these weights, by kind.
        is_chat: Whether its tokenizer has a chat template.
        has_tokenizer: Whether it has a tokenizer.
    """

    folder_name: str
    repo_id: str | None
    report: ConversionReport
    recipe: Recipe
    base: Base
    inherited: Inherited
    config: Mapping[str, Any]
    files: frozenset[str] = frozenset()
    tensors: frozenset[str] = frozenset()
    measures: Measures = field(default_factory=lambda: Measures())
    is_chat: bool = False
    has_tokenizer: bool = True

    @property
    def quality(self) -> frozenset[str]:
        """Kinds of measures that say how good it is, not what it costs."""
        return frozenset(self.measures) - {"cost"}

    @property
    def title(self) -> str:
        """Name of the result."""
        return self.folder_name if self.repo_id is None else self.repo_id.split("/")[-1]

    @property
    def location(self) -> str:
        """What a program loads: the repository, or the folder."""
        return self.repo_id or self.folder_name

    @property
    def layout(self) -> Layout:
        """How it is written down."""
        return self.recipe.layout

    @property
    def is_pruned(self) -> bool:
        """Whether experts were pruned, not merged."""
        return self.recipe.method is Method.PRUNE

    @property
    def layers(self) -> Sequence[LayerReport]:
        """The MoE layers."""
        return self.report.layers

    @property
    def experts_before(self) -> int:
        """Experts of every MoE layer of the base."""
        return self.report.experts["before"]

    @property
    def changed(self) -> Sequence[LayerReport]:
        """The MoE layers that have fewer distinct experts than before."""
        return [layer for layer in self.layers if layer.experts < self.experts_before]

    @property
    def refits(self) -> Sequence[RefitReport]:
        """The refits that were kept, one per layer that has one."""
        return [layer.refit for layer in self.layers if layer.refit is not None and layer.refit.is_kept]

    @property
    def training(self) -> ModelRefitReport | None:
        """What training the whole model did; ``None`` if there was none, or it was dropped."""
        found = self.report.refit_model
        return found if found is not None and found.is_kept else None

    @property
    def is_recovered(self) -> bool:
        """Whether it was trained after its conversion, and is better for it."""
        return self.report.recovery is not None and self.report.recovery["kept_step"] > 0

    @property
    def is_fitted(self) -> bool:
        """Whether anything was fitted to calibration text, experts or router rows."""
        return bool(self.refits) or any(layer.router.is_fitted for layer in self.layers)

    @property
    def experts_left(self) -> str:
        """Distinct experts per layer: ``4``, or ``3 to 6 (4.5 on average)``."""
        return spread([layer.experts for layer in self.layers])

    @property
    def experts_left_where_changed(self) -> str:
        """The same of the layers that have fewer than before."""
        return spread([layer.experts for layer in self.changed])

    @property
    def changed_layers(self) -> str:
        """The layers that have fewer experts, in words."""
        changed, layers, heads = len(self.changed), len(self.layers), self.mtp_layers
        if changed < layers:
            return f"{changed} of its {format_plural(layers, 'MoE layer')}"
        all_layers = "its only MoE layer" if layers - heads == 1 else f"each of its {layers - heads} MoE layers"
        return f"{all_layers} and of its multi-token prediction head" if heads else all_layers

    @property
    def mtp_layers(self) -> int:
        """Layers of a multi-token prediction head, the last ones of ``layers``."""
        return self.report.experts.get("mtp_layers", 0)


def spread(counts: Sequence[int]) -> str:
    """Several counts: ``4``, or ``3 to 6 (4.5 on average)``."""
    least, greatest = min(counts), max(counts)
    return str(least) if least == greatest else f"{least} to {greatest} ({fmean(counts):.4g} on average)"


def name_of(checkpoint: SourceRecord | Checkpoint) -> str:
    """Repository of a checkpoint that a report names, or its folder."""
    return checkpoint.get("repo_id") or checkpoint.get("path") or "the source"
