"""What happens to one MoE layer while it is in memory: compare experts, choose, merge, route, measure."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hcsmoe_hub.events import Listener, Warned
from hcsmoe_hub.layer.compression import compress_experts
from hcsmoe_hub.layer.context import LayerContext
from hcsmoe_hub.layer.deviation import Deviation, compare_reduced, compare_tied
from hcsmoe_hub.layer.distances import compare_experts
from hcsmoe_hub.layer.narrowing import narrow_experts
from hcsmoe_hub.layer.neuron_energies import collect_energies
from hcsmoe_hub.layer.outcome import LayerOutcome, picture_of
from hcsmoe_hub.layer.output_scale import scale_outputs
from hcsmoe_hub.layer.picture import LayerPicture
from hcsmoe_hub.layer.refit import refit_layer
from hcsmoe_hub.layer.refit_rounded import Rounder, refit_rounded
from hcsmoe_hub.layer.router_fit import RouterFit, RouterFitter
from hcsmoe_hub.layer.selection import Selection, given_selection, select
from hcsmoe_hub.layer.spectra import Spectra
from hcsmoe_hub.layer.stored_experts import Heritage, StoredExperts
from hcsmoe_hub.layer.subset_error import SubsetError
from hcsmoe_hub.layer.weights import BlockWeights
from hcsmoe_hub.machine import ranks
from hcsmoe_hub.machine.allocator import return_freed_memory
from hcsmoe_hub.methods.clustering import NeuronEnergies
from hcsmoe_hub.methods.merging import MergeGroups, NeuronOrigins, member_shares, merge_experts
from hcsmoe_hub.methods.refit.held_out import OwnTokens
from hcsmoe_hub.methods.routing import reduce_rows, remap_experts
from hcsmoe_hub.model.blocks import MoEBlock
from hcsmoe_hub.model.layer_loader import free
from hcsmoe_hub.observation.observers import SampleObserver
from hcsmoe_hub.observation.overflow import check_result
from hcsmoe_hub.observation.sample import NeuronSample
from hcsmoe_hub.observation.watcher import Observation
from hcsmoe_hub.options import Layout, Merge, Refit, RouterPolicy
from hcsmoe_hub.planning.conversion_plan import ConversionPlan
from hcsmoe_hub.report import LayerReport, RefitReport


class LayerReducer:
    """Turns the N experts of one layer after another into K.

    Args:
        plan: What to do.
        emit: Called with warnings.
        stored: Rounds the experts of the result to the format of the source.

    Attributes:
        reports: One report per MoE layer, in order.
        pictures: What a figure shows of each of them, if the plan asks for one.
        origins: Where the neurons of the experts come from, by layer, where these were chosen one by one.
        spectra: Singular values by decoder layer, if the plan asks for a figure and compresses experts.
    """

    def __init__(self, plan: ConversionPlan, emit: Listener, stored: StoredExperts) -> None:
        self.reports: list[LayerReport] = []
        self.pictures: list[LayerPicture] = []
        self.origins: dict[int, NeuronOrigins] = {}
        self.spectra: dict[int, Spectra] = {}
        self._plan = plan
        self._emit = emit
        self._stored = stored

    def reduce(self, layer: LayerContext, seen: Observation, *, fitted: Observation) -> dict[str, Tensor]:
        """Converts one block.

        Args:
            layer: Its layer; the weights are in memory, and those of its experts are freed.
            seen: What was observed of it.
            fitted: What it is fitted to: ``seen``, or its inputs in the result and the outputs wanted there.

        Returns:
            Its tensors in the result that differ from the source's, by parameter name.

        Raises:
            VerificationError: If the source holds weights that are not finite, or values overflow; names the tensor.
        """
        weights = BlockWeights.of(layer)
        sample = self._sample(layer, seen) if self._plan.recipe.needs_sample else None
        energies = self._energies(layer, weights, seen) if self._plan.recipe.needs_energies else None
        # A near-tie must not fall differently on another rank.
        chosen = ranks.from_first(self._select(layer, weights, seen, sample, energies))
        merged = self._merge(layer, weights, chosen, seen, sample, energies)
        # They are large, and nothing below needs them.
        del energies
        spectra = self._spectra(layer, weights, merged)
        changed = self._lay_out(layer.block, weights, chosen, merged, seen)
        ranks.settle(changed)
        fit = self._fit_router(layer, chosen, changed, seen, fitted)
        self._scale(layer, chosen, changed, seen, fitted)
        refit = self._refit(layer, chosen, changed, fitted)
        ranks.settle(changed)
        del merged
        factors = self._compress(layer, changed, fitted)
        changed |= self._round(layer, changed, chosen, refit, fitted)
        # Whatever has made them: nothing else is written of the block.
        check_result(layer.block.layer, changed | factors)
        deviation = self._compare(layer, changed, chosen, seen)
        outcome = LayerOutcome(
            recipe=self._plan.recipe, chosen=chosen, deviation=deviation, fit=fit, refit=refit, spectra=spectra
        )
        self.reports.append(outcome.report(layer.block.layer, seen.statistics))
        if self._plan.options.figure:
            self.pictures.append(picture_of(layer.block.layer, self._plan.recipe, chosen, seen.statistics))
            if spectra is not None:
                self.spectra[layer.block.layer] = spectra
        # The source's experts are not needed any more; writing briefly holds parts of the merged ones twice.
        free(layer.source.experts.module)
        return_freed_memory()
        return changed | factors

    def _select(
        self,
        layer: LayerContext,
        weights: BlockWeights,
        seen: Observation,
        sample: NeuronSample | None,
        energies: NeuronEnergies | None,
    ) -> Selection:
        """Compares the experts and decides which are merged or kept, unless another conversion has decided it."""
        recipe, statistics, number = self._plan.recipe, seen.statistics, layer.block.layer
        if self._plan.like is not None:
            made = self._plan.like.layer(number)
            chosen = given_selection(made.labels, made.dominant)
            self._warn_unused(number, chosen, statistics.usage_E.tolist())
            return chosen
        compared = compare_experts(
            recipe,
            statistics,
            expert_rows=list(weights.experts.values()),
            router_rows=[rows for rows in weights.router.values() if rows.dim() == 2],
            sample=sample,
            energies=energies,
        )
        chosen = select(
            # Otherwise random groups and starts would be the same in every layer.
            replace(recipe, seed=recipe.seed + number),
            statistics,
            compared,
            self._plan.experts_by_layer[number],
            protected=recipe.protected(number),
            subset_error=lambda: self._subset_error(layer, weights, seen),
        )
        self._warn_unused(number, chosen, statistics.usage_E.tolist())
        return chosen

    def _energies(self, layer: LayerContext, weights: BlockWeights, seen: Observation) -> NeuronEnergies:
        """What every neuron adds to the output."""
        origins = self._given_origins(layer)
        return collect_energies(layer, weights, seen, named=frozenset() if origins is None else origins.experts)

    def _given_origins(self, layer: LayerContext) -> NeuronOrigins | None:
        """The neurons that another conversion has chosen, if its choices are applied."""
        return None if self._plan.like is None else self._plan.like.origins.get(layer.block.layer)

    def _sample(self, layer: LayerContext, seen: Observation) -> NeuronSample:
        """What the experts are given on the sampled tokens."""
        observer = rerun_on_sample(layer, seen)
        tokens_TH, weight_TK = torch.cat(observer.tokens), torch.cat(observer.weights)
        index_TK = torch.cat(observer.top_k).long()
        if seen.statistics.sample is None:
            tokens_TH, weight_TK, index_TK = map(ranks.joined, (tokens_TH, weight_TK, index_TK))
            generator = torch.Generator().manual_seed(self._plan.calibration.seed)
            own = OwnTokens.of(len(tokens_TH), layer.device)
            order = torch.randperm(own.total, generator=generator)[: self._plan.feature_tokens].sort().values
            tokens_TH, weight_TK, index_TK = (
                ranks.joined(values.to(layer.device)[own.part(order).to(layer.device)])
                for values in (tokens_TH, weight_TK, index_TK)
            )
        return NeuronSample(experts=layer.source.experts, tokens_TH=tokens_TH, index_TK=index_TK, weight_TK=weight_TK)

    def _subset_error(self, layer: LayerContext, weights: BlockWeights, seen: Observation) -> SubsetError:
        call = seen.statistics.sample
        assert call is not None, "the plan refuses the reconstruction error for blocks without a sample"
        return SubsetError(layer, weights, sample=self._sample(layer, seen), call=call)

    def _merge(
        self,
        layer: LayerContext,
        weights: BlockWeights,
        chosen: Selection,
        seen: Observation,
        sample: NeuronSample | None,
        energies: NeuronEnergies | None,
    ) -> dict[str, Tensor]:
        """The K experts, experts first, by parameter name."""
        block, statistics, recipe = layer.block, seen.statistics, self._plan.recipe
        share_EC = member_shares(
            chosen.grouping,
            recipe.merge or Merge.AVERAGE,
            usage_E=statistics.usage_E.tolist(),
            saliency_E=(statistics.saliency_E * statistics.usage_E).tolist(),
            dominants=chosen.dominants,
            dominant_weights=recipe.dominant_weights,
        )
        groups = MergeGroups(
            clusters=chosen.clusters,
            dominants=chosen.dominants,
            share_EC=share_EC,
            shapes=layer.expert_shapes() if self._plan.is_narrower else None,
            origins=self._given_origins(layer),
        )
        view = layer.source.experts.neurons
        merged = merge_experts(weights.experts, view, groups=groups, recipe=recipe, sample=sample, energies=energies)
        for number in merged.unseen:
            names = ", ".join(map(str, chosen.clusters.members[number]))
            self._emit(
                Warned(f"layer {block.layer}: too few sampled tokens reach experts {names}; neurons matched by weight.")
            )
        rows, origins = merged.tensors, merged.origins
        if self._plan.is_narrower and recipe.merge is not Merge.NEURONS:
            anchors = [groups.anchor(number, recipe.align_to) for number in range(len(chosen.dominants))]
            rows, origins = self._narrow(layer, rows, chosen, seen, anchors)
        if origins is not None and (self._plan.is_narrower or not chosen.keeps_all):
            self.origins[block.layer] = origins
        return {block.full_name(name): rows_C for name, rows_C in rows.items()}

    def _narrow(
        self,
        layer: LayerContext,
        rows: Mapping[str, Tensor],
        chosen: Selection,
        seen: Observation,
        anchors: Sequence[int],
    ) -> tuple[dict[str, Tensor], NeuronOrigins | None]:
        """Experts of fewer neurons, and which these are, numbered as in the source expert whose order each one has."""
        made = self._given_origins(layer)
        given_CW = None if made is None else made.neurons()
        narrower, kept_CW = narrow_experts(layer, rows, chosen.clusters, seen, given_CW=given_CW)
        # ZipIt puts the neurons of merged experts in an order of its own.
        is_named = self._plan.recipe.merge is not Merge.ZIPIT
        return narrower, NeuronOrigins.within(anchors, kept_CW) if is_named else None

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
            # Rounded as it will be written, whatever the layer is computed in.
            changed[tensor.name] = weights.join(tensor, rows).to(self._plan.model.dtype)
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
        for name in block.tables:
            changed[name] = remap_experts(weights.state[name], clusters)
        return changed

    def _fit_router(
        self,
        layer: LayerContext,
        chosen: Selection,
        changed: dict[str, Tensor],
        seen: Observation,
        fitted: Observation,
    ) -> RouterFit | None:
        """Fits the router rows, in place, where a router chooses and anything was merged or dropped."""
        if not self._plan.recipe.fits_router or layer.block.tables or chosen.keeps_all:
            return None
        return RouterFitter(layer, chosen.clusters, seen=seen, fitted=fitted).fit(changed)

    def _scale(
        self,
        layer: LayerContext,
        chosen: Selection,
        changed: Mapping[str, Tensor],
        seen: Observation,
        fitted: Observation,
    ) -> None:
        """Scales experts of the best neurons, in place, to the weights that a reduced router gives them."""
        recipe, experts = self._plan.recipe, layer.source.experts
        if recipe.merge is not Merge.NEURONS or recipe.is_tied or chosen.keeps_all:
            return
        # Elsewhere a scale of the down projection is not one of the output, or not the inverse of one of the weight.
        if experts.is_affine and not experts.scales_input:
            scale_outputs(layer, changed, clusters=chosen.clusters, seen=seen, fitted=fitted)

    def _refit(
        self, layer: LayerContext, chosen: Selection, changed: Mapping[str, Tensor], fitted: Observation
    ) -> RefitReport | None:
        """Fits what the recipe refits, in place; a layer whose experts are all as they were has nothing to refit."""
        recipe = self._plan.recipe
        if not isinstance(recipe.refit, Refit) or (chosen.keeps_all and not self._plan.is_narrower):
            return None
        return refit_layer(
            layer,
            changed,
            what=recipe.refit,
            passes=recipe.refit_passes or 1,
            seen=fitted,
            seed=recipe.seed + layer.block.layer,
        )

    def _spectra(self, layer: LayerContext, weights: BlockWeights, merged: Mapping[str, Tensor]) -> Spectra | None:
        """Singular values before and after the merge, where matrices are about to become factors."""
        if self._plan.factors is None:
            return None
        block = layer.block
        rows = {block.name_in_experts(tensor): merged[tensor.name] for tensor in block.experts}
        return Spectra.of(layer.source.experts.neurons, weights.experts, rows)

    def _compress(self, layer: LayerContext, changed: Mapping[str, Tensor], fitted: Observation) -> dict[str, Tensor]:
        """Factors of the expert matrices; in ``changed`` these become what their factors add up to."""
        if self._plan.factors is None:
            return {}
        return compress_experts(layer, changed, self._plan.factors, seen=fitted)

    def _round(
        self,
        layer: LayerContext,
        changed: Mapping[str, Tensor],
        chosen: Selection,
        refit: RefitReport | None,
        fitted: Observation,
    ) -> dict[str, Tensor]:
        """Experts as the result will hold them: that is what is measured, and what later layers see."""
        heritage = self._heritage(chosen)
        rounded = self._stored.round(layer, changed, heritage)
        if rounded.tensors and refit is not None and refit.is_kept:
            rounder = Rounder(stored=self._stored, heritage=heritage, before=rounded)
            rounded = refit_rounded(layer, changed, rounder, seen=fitted)
        self._stored.keep(layer.block.layer, rounded)
        return rounded.tensors

    def _heritage(self, chosen: Selection) -> Heritage:
        """Where the written experts come from."""
        members = chosen.clusters.members
        numbers = chosen.clusters.labels if self._plan.recipe.layout is Layout.FULL else range(len(members))
        return Heritage(
            origins=[chosen.dominants[number] for number in numbers], members=[members[number] for number in numbers]
        )

    def _compare(
        self, layer: LayerContext, changed: Mapping[str, Tensor], chosen: Selection, seen: Observation
    ) -> Deviation:
        if layer.result is not None:
            return compare_reduced(layer, changed, clusters=chosen.clusters, seen=seen)
        labels = chosen.clusters.labels
        is_full = self._plan.recipe.layout is Layout.FULL
        # In the full layout, one of the copies of each expert.
        rows = [labels.index(number) if is_full else number for number in range(len(chosen.clusters.members))]
        joined = {}
        for tensor in layer.block.experts:
            rows_C = tensor.split(changed[tensor.name])[0][rows]
            joined[tensor.name] = tensor.join(rows_C, rows_C[:0])
        return compare_tied(layer, joined, clusters=chosen.clusters, seen=seen)

    def _warn_unused(self, layer: int, chosen: Selection, usage_E: list[int]) -> None:
        if self._plan.recipe.merge is not Merge.FREQUENCY:
            return
        for members in chosen.clusters.members:
            if len(members) > 1 and not any(usage_E[expert] for expert in members):
                names = ", ".join(map(str, members))
                self._emit(Warned(f"layer {layer}: no calibration token reached experts {names}; merged equally."))


def rerun_on_sample(layer: LayerContext, seen: Observation) -> SampleObserver:
    """Runs the source's block on its sample, or on all it has seen where it cannot run on single tokens."""
    calls = seen.calls if seen.statistics.sample is None else [seen.statistics.sample]
    return layer.source.rerun(calls, SampleObserver)
