"""What happens to one MoE layer while it is in memory: compare experts, choose, merge, route, measure."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from hcsmoe_hub.errors import VerificationError
from hcsmoe_hub.events import Listener, Warned
from hcsmoe_hub.layer.deviation import Deviation, compare_reduced, compare_tied
from hcsmoe_hub.layer.distances import expert_distances
from hcsmoe_hub.layer.picture import LayerPicture
from hcsmoe_hub.layer.refit import refit_layer
from hcsmoe_hub.layer.router_fit import RouterFit, RouterFitter
from hcsmoe_hub.layer.selection import Selection, select
from hcsmoe_hub.layer.subset_error import SubsetError
from hcsmoe_hub.layer.weights import BlockWeights
from hcsmoe_hub.machine.allocator import return_freed_memory
from hcsmoe_hub.methods.merging import member_shares, merge_experts
from hcsmoe_hub.methods.routing import reduce_rows, remap_experts
from hcsmoe_hub.model.blocks import MoEBlock
from hcsmoe_hub.model.experts import experts_of
from hcsmoe_hub.model.layer_loader import free
from hcsmoe_hub.model.microbatch import MicroBatcher
from hcsmoe_hub.model.neurons import neurons_of
from hcsmoe_hub.observation.observers import SampleObserver
from hcsmoe_hub.observation.sample import NeuronSample
from hcsmoe_hub.observation.watcher import BROKEN_WEIGHTS_HINT, Observation, rerun
from hcsmoe_hub.options import Layout, Merge, RouterPolicy
from hcsmoe_hub.planning.conversion_plan import ConversionPlan
from hcsmoe_hub.report import LayerReport, RefitReport, RouterReport


class LayerReducer:
    """Turns the N experts of one layer after another into K.

    Args:
        plan: What to do.
        batcher: Knows the device, and cuts sequences into micro-batches.
        emit: Called with warnings.

    Attributes:
        reports: One report per MoE layer, in order.
        pictures: What a figure shows of each of them, if the plan asks for one.
    """

    def __init__(self, plan: ConversionPlan, batcher: MicroBatcher, emit: Listener) -> None:
        self.reports: list[LayerReport] = []
        self.pictures: list[LayerPicture] = []
        self._plan = plan
        self._model = plan.model
        self._source = plan.model.skeleton.module
        self._batcher = batcher
        self._emit = emit

    def reduce(
        self, block: MoEBlock, originals: Mapping[str, Tensor], seen: Observation, fitted: Observation
    ) -> dict[str, Tensor]:
        """Converts one block.

        Args:
            block: The block; its layer's weights are in memory.
            originals: Its router tensors as stored, by parameter name.
            seen: What was observed of it.
            fitted: What it is fitted to: ``seen``, or its inputs in the result and the outputs wanted there.

        Returns:
            Its tensors in the result that differ from the source's, by parameter name.

        Raises:
            VerificationError: If the source holds weights that are not finite.
        """
        recipe, statistics = self._plan.recipe, seen.statistics
        weights = BlockWeights.of(self._model, block, originals)
        sample = self._sample(block, seen) if recipe.needs_sample else None
        distances = expert_distances(
            recipe,
            statistics,
            expert_rows=list(weights.experts.values()),
            router_rows=[rows for rows in weights.router.values() if rows.dim() == 2],
            sample=sample,
        )
        chosen = select(
            # Otherwise random groups and starts would be the same in every layer.
            replace(recipe, seed=recipe.seed + block.layer),
            statistics,
            distances,
            self._plan.experts_by_layer[block.layer],
            protected=recipe.protected(block.layer),
            subset_error=lambda: self._subset_error(block, weights, seen),
        )
        self._warn_unused(block, chosen, statistics.usage_E.tolist())
        merged = self._merge(block, weights, chosen, seen, sample)
        changed = self._lay_out(block, weights, chosen, merged, seen)
        fit = self._fit_router(block, chosen, changed, seen, fitted)
        refit = self._refit(block, chosen, changed, fitted)
        deviation = self._compare(block, changed, merged, chosen, seen)
        self.reports.append(self._report(block, chosen, seen, deviation, fit, refit))
        if self._plan.options.figure:
            self.pictures.append(_picture(block, chosen, statistics.usage_E.tolist()))
        # The source's experts are not needed any more; writing briefly holds parts of the merged ones twice.
        free(self._source.get_submodule(block.experts_path))
        return_freed_memory()
        return changed

    def rerun_on_sample(self, block: MoEBlock, seen: Observation) -> SampleObserver:
        """Runs the source's block on its sample, or on all it has seen where it cannot run on single tokens."""
        whole = self._model.is_whole_layer(block)
        calls = seen.calls if seen.statistics.sample is None else [seen.statistics.sample]
        moe, experts = self._source.get_submodule(block.path), self._source.get_submodule(block.experts_path)
        observer = rerun(moe, experts, calls, SampleObserver, batcher=self._batcher, whole_layer=whole)
        assert isinstance(observer, SampleObserver)
        return observer

    def _sample(self, block: MoEBlock, seen: Observation) -> NeuronSample:
        """What the experts are given on the sampled tokens."""
        observer = self.rerun_on_sample(block, seen)
        tokens_TH, weight_TK = torch.cat(observer.tokens), torch.cat(observer.weights)
        index_TK = torch.cat(observer.top_k).long()
        if seen.statistics.sample is None:
            generator = torch.Generator().manual_seed(self._plan.calibration.seed)
            order = torch.randperm(len(tokens_TH), generator=generator)[: self._plan.feature_tokens].sort().values
            tokens_TH, weight_TK, index_TK = tokens_TH[order], weight_TK[order], index_TK[order]
        experts = experts_of(self._source.get_submodule(block.experts_path))
        return NeuronSample(experts=experts, tokens_TH=tokens_TH, index_TK=index_TK, weight_TK=weight_TK)

    def _subset_error(self, block: MoEBlock, weights: BlockWeights, seen: Observation) -> SubsetError:
        assert self._plan.reduced is not None, "pruning always has the reduced layout"
        assert seen.statistics.sample is not None, "the plan refuses the reconstruction error for blocks without one"
        return SubsetError(
            self._model,
            self._plan.reduced,
            block,
            weights,
            sample=self._sample(block, seen),
            call=seen.statistics.sample,
            batcher=self._batcher,
        )

    def _merge(
        self, block: MoEBlock, weights: BlockWeights, chosen: Selection, seen: Observation, sample: NeuronSample | None
    ) -> dict[str, Tensor]:
        """The K experts, experts first, by parameter name."""
        module, statistics, recipe = self._source.get_submodule(block.experts_path), seen.statistics, self._plan.recipe
        share_EC = member_shares(
            chosen.clusters,
            recipe.merge or Merge.AVERAGE,
            usage_E=statistics.usage_E.tolist(),
            saliency_E=(statistics.saliency_E * statistics.usage_E).tolist(),
            dominants=chosen.dominants,
            dominant_weights=recipe.dominant_weights,
            membership_EC=chosen.grouping.membership_EC,
        )
        merged = merge_experts(
            weights.experts,
            lambda rows: neurons_of(module, rows),
            chosen.clusters,
            recipe,
            share_EC,
            dominants=chosen.dominants,
            sample=sample,
        )
        for number in merged.unseen:
            names = ", ".join(map(str, chosen.clusters.members[number]))
            self._emit(
                Warned(f"layer {block.layer}: too few sampled tokens reach experts {names}; neurons matched by weight.")
            )
        for name, rows_C in merged.tensors.items():
            self._check_finite(f"{block.experts_path}.{name}", rows_C)
        return {f"{block.experts_path}.{name}": rows_C for name, rows_C in merged.tensors.items()}

    @staticmethod
    def _check_finite(name: str, values: Tensor) -> None:
        if not all(bound.isfinite() for bound in values.aminmax()):
            raise VerificationError(f"{name} is not finite: the source holds broken weights.", hint=BROKEN_WEIGHTS_HINT)

    def _lay_out(
        self, block: MoEBlock, weights: BlockWeights, chosen: Selection, merged: Mapping[str, Tensor], seen: Observation
    ) -> dict[str, Tensor]:
        """The changed tensors of the result, by parameter name."""
        recipe, clusters = self._plan.recipe, chosen.clusters
        labels = list(clusters.labels)
        changed = {}
        for tensor in block.experts:
            rows_C = merged[tensor.name]
            # In the full layout the members of a cluster are copies of its expert.
            rows = rows_C[labels] if recipe.layout is Layout.FULL else rows_C
            changed[tensor.name] = weights.join(tensor, rows)
        if recipe.is_tied:
            return changed
        for tensor in block.router:
            rows_C = reduce_rows(
                weights.router[tensor.name],
                clusters,
                # Pruned experts take their rows along: every kept one is the dominant of its own cluster.
                recipe.router or RouterPolicy.DOMINANT,
                dominants=chosen.dominants,
                usage_E=seen.statistics.usage_E.tolist(),
                membership_EC=chosen.grouping.membership_EC,
            )
            changed[tensor.name] = weights.join(tensor, rows_C)
            self._check_finite(tensor.name, changed[tensor.name])
        for name in block.tables:
            changed[name] = remap_experts(weights.state[name], clusters)
        return changed

    def _fit_router(
        self, block: MoEBlock, chosen: Selection, changed: dict[str, Tensor], seen: Observation, fitted: Observation
    ) -> RouterFit | None:
        """Fits the router rows, in place, where a router chooses and anything was merged or dropped."""
        if not self._plan.recipe.fits_router or block.tables or _is_whole(chosen):
            return None
        assert self._plan.reduced is not None, "only the reduced layout has fewer router rows"
        fitter = RouterFitter(self._model, self._plan.reduced, block, chosen.clusters, seen, fitted, self._batcher)
        fit = fitter.fit(changed)
        for tensor in block.router:
            self._check_finite(tensor.name, changed[tensor.name])
        return fit

    def _refit(
        self, block: MoEBlock, chosen: Selection, changed: Mapping[str, Tensor], seen: Observation
    ) -> RefitReport | None:
        """Fits what the recipe refits, in place; a layer in which nothing was merged has nothing to refit."""
        recipe, reduced = self._plan.recipe, self._plan.reduced
        if recipe.refit is None or _is_whole(chosen):
            return None
        assert reduced is not None, "only the reduced layout is refitted"
        return refit_layer(
            recipe.refit, self._model, reduced, block, changed, seen, self._batcher, seed=recipe.seed + block.layer
        )

    def _compare(
        self,
        block: MoEBlock,
        changed: Mapping[str, Tensor],
        merged: Mapping[str, Tensor],
        chosen: Selection,
        seen: Observation,
    ) -> Deviation:
        if self._plan.reduced is not None:
            return compare_reduced(
                self._model, self._plan.reduced, block, changed, chosen.clusters, seen, self._batcher
            )
        joined = {tensor.name: tensor.join(merged[tensor.name], merged[tensor.name][:0]) for tensor in block.experts}
        return compare_tied(self._model, block, joined, chosen.clusters, seen, self._batcher)

    def _warn_unused(self, block: MoEBlock, chosen: Selection, usage_E: list[int]) -> None:
        if self._plan.recipe.merge is not Merge.FREQUENCY:
            return
        for members in chosen.clusters.members:
            if len(members) > 1 and not any(usage_E[expert] for expert in members):
                names = ", ".join(map(str, members))
                text = f"layer {block.layer}: no calibration token reached experts {names}; merged equally."
                self._emit(Warned(text))

    def _report(
        self,
        block: MoEBlock,
        chosen: Selection,
        seen: Observation,
        deviation: Deviation,
        fit: RouterFit | None,
        refit: RefitReport | None,
    ) -> LayerReport:
        recipe, statistics, clusters = self._plan.recipe, seen.statistics, chosen.clusters
        usage_E: list[int] = statistics.usage_E.tolist()
        tree = chosen.grouping.tree
        policy = "unchanged" if recipe.is_tied else (recipe.router.value if recipe.router else "kept rows")
        return LayerReport(
            layer=block.layer,
            experts=len(clusters.members),
            labels=list(clusters.labels),
            dominant=list(chosen.dominants),
            usage=usage_E,
            routing_score=statistics.routing_score_E.tolist(),
            saliency=statistics.saliency_E.tolist(),
            dead_experts=[expert for expert, count in enumerate(usage_E) if count == 0],
            merge_heights=list(clusters.heights),
            tree=None if tree is None else [[int(left), int(right), float(height)] for left, right, height, _ in tree],
            silhouette=chosen.silhouette(),
            dunn=chosen.dunn(),
            router=RouterReport(
                policy=policy,
                top_k_agreement=deviation.top_k_agreement,
                is_fitted=(fit is not None and fit.is_kept) if recipe.fits_router else None,
                top_k_agreement_before=None if fit is None else fit.agreement_before,
            ),
            refit=refit,
            output_error=deviation.output_error,
            measured_tokens=deviation.tokens,
        )


def _is_whole(chosen: Selection) -> bool:
    """Whether every expert is still there, alone."""
    return len(chosen.clusters.members) == len(chosen.clusters.labels)


def _picture(block: MoEBlock, chosen: Selection, usage_E: list[int]) -> LayerPicture:
    return LayerPicture(
        layer=block.layer,
        usage=usage_E,
        labels=chosen.clusters.labels,
        distances_EE=chosen.distances_EE,
        tree=chosen.grouping.tree,
    )
