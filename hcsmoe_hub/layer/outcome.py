"""What the report and the figure say about one converted layer."""

from dataclasses import dataclass

from hcsmoe_hub.layer.deviation import Deviation
from hcsmoe_hub.layer.picture import LayerPicture
from hcsmoe_hub.layer.router_fit import RouterFit
from hcsmoe_hub.layer.selection import Selection
from hcsmoe_hub.layer.spectra import Spectra
from hcsmoe_hub.observation.statistics import LayerStatistics
from hcsmoe_hub.options import Linkage
from hcsmoe_hub.recipe.recipe import Recipe
from hcsmoe_hub.report import LayerReport, RefitReport, RouterReport


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerOutcome:
    """What a conversion decided about one layer, and what that did to it.

    Attributes:
        recipe: Every choice in force.
        chosen: Which experts were merged or kept.
        deviation: How far the converted block is from the one of the source.
        fit: What a fit of the router did; ``None`` where there was none.
        refit: What a refit of the experts did; ``None`` where there was none.
        spectra: Singular values before and after the merge; ``None`` unless experts become factors.
    """

    recipe: Recipe
    chosen: Selection
    deviation: Deviation
    fit: RouterFit | None
    refit: RefitReport | None
    spectra: Spectra | None = None

    def report(self, layer: int, statistics: LayerStatistics) -> LayerReport:
        """The part of the report that belongs to the layer.

        Args:
            layer: Index of the decoder layer.
            statistics: What was observed of it.
        """
        chosen, usage_E = self.chosen, statistics.usage_E.tolist()
        tree = chosen.grouping.tree
        return LayerReport(
            layer=layer,
            experts=len(chosen.clusters.members),
            labels=list(chosen.clusters.labels),
            dominant=list(chosen.dominants),
            usage=usage_E,
            routing_score=statistics.routing_score_E.tolist(),
            saliency=statistics.saliency_E.tolist(),
            dead_experts=[expert for expert, count in enumerate(usage_E) if count == 0],
            merge_heights=list(chosen.clusters.heights),
            tree=None if tree is None else [[int(left), int(right), float(height)] for left, right, height, _ in tree],
            silhouette=chosen.silhouette(),
            dunn=chosen.dunn(),
            router=self._router(),
            refit=self.refit,
            output_error=self.deviation.output_error,
            measured_tokens=self.deviation.tokens,
            stable_rank=None if self.spectra is None else self.spectra.report(),
        )

    def _router(self) -> RouterReport:
        recipe, fit = self.recipe, self.fit
        return RouterReport(
            policy="unchanged" if recipe.is_tied else (recipe.router.value if recipe.router else "kept rows"),
            top_k_agreement=self.deviation.top_k_agreement,
            is_fitted=(fit is not None and fit.is_kept) if recipe.fits_router else None,
            top_k_agreement_before=None if fit is None else fit.agreement_before,
        )


def picture_of(layer: int, recipe: Recipe, chosen: Selection, statistics: LayerStatistics) -> LayerPicture:
    """What the figure shows of a layer."""
    return LayerPicture(
        layer=layer,
        usage=statistics.usage_E.tolist(),
        labels=chosen.clusters.labels,
        distances_EE=chosen.distances_EE,
        tree=chosen.grouping.tree,
        is_loss=recipe.linkage is Linkage.LOSS,
    )
