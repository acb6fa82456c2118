"""What a conversion does: every choice in force, with nothing left open."""

from dataclasses import dataclass, fields
from typing import Any

from hcsmoe_hub.options import (
    Align,
    AlignTo,
    Budget,
    Clustering,
    Compression,
    Distance,
    Dominant,
    Features,
    FormerRefit,
    KMeansStart,
    Layout,
    Linkage,
    Merge,
    Method,
    Propagate,
    Refit,
    RouterPolicy,
    Saliency,
    Similarity,
)

# Merges that average groups of neurons.
NEURON_MERGES = frozenset({Merge.FIX_DOM, Merge.FIX_DOM_ONE_TO_ONE, Merge.ZIPIT})
# What follows the choice of experts and neurons: a conversion that applies another one's choices decides it anew.
AFTERWARDS = ("refit", "refit_passes", "router", "propagate")
# Distances between the outputs of two experts token by token, instead of between two vectors.
OVERLAPS = frozenset({Distance.KL_DIVERGENCE, Distance.WASSERSTEIN})


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Every choice in force; ``None`` where the other choices leave nothing to choose.

    The attributes are those of ``MethodOptions`` without the preset.
    """

    method: Method
    similarity: tuple[Similarity, ...] | None
    distance: Distance | None
    clustering: Clustering | None
    linkage: Linkage | None
    kmeans_start: KMeansStart | None
    dominant: Dominant | None
    budget: Budget
    max_cluster_size: int | None
    protect: tuple[tuple[int | None, int], ...]
    layers: tuple[int, ...] | None
    merge: Merge | None
    dominant_weights: tuple[float, float] | None
    features: Features | None
    align: Align | None
    align_to: AlignTo | None
    saliency: Saliency | None
    refit: Refit | FormerRefit | None
    refit_passes: int | None
    router: RouterPolicy | None
    propagate: Propagate | None
    layout: Layout
    compress: str | None
    seed: int

    @property
    def is_tied(self) -> bool:
        """Whether the router keeps its N rows and several of them lead to one expert."""
        return self.layout in (Layout.MAPPED, Layout.FULL)

    @property
    def compression(self) -> Compression | None:
        """What the matrices of the experts are reduced to; ``None`` if they stay whole."""
        return None if self.compress is None else Compression.parse(self.compress)

    @property
    def needs_sample(self) -> bool:
        """Whether merging looks at what the experts do on sampled tokens, after the statistics are complete."""
        uses_activations = self.features in (Features.ACTIVATION, Features.ACTIVATION_WEIGHT)
        return uses_activations or self.align is Align.ACTIVATION or self.distance in OVERLAPS

    @property
    def needs_mean_outputs(self) -> bool:
        """Whether experts are compared by their mean outputs, for which each of them runs on every token."""
        return Similarity.EXPERT_OUTPUT in (self.similarity or ()) and self.distance not in OVERLAPS

    @property
    def needs_gram(self) -> bool:
        """Whether experts are kept by the products of their outputs."""
        return self.saliency in (Saliency.GRAM, Saliency.OMP)

    @property
    def needs_energies(self) -> bool:
        """Whether grouping or merging looks at what every single neuron adds to the output of a layer."""
        return self.linkage is Linkage.LOSS or self.merge is Merge.NEURONS

    @property
    def refits(self) -> bool:
        """Whether something is refitted to the original layer's output."""
        return self.refit not in (None, Refit.NONE)

    @property
    def refits_model(self) -> bool:
        """Whether the whole reduced model is trained on the logits of its source, after its layers were refitted."""
        return self.refit is Refit.MODEL

    @property
    def fits_router(self) -> bool:
        """Whether router rows are fitted to the full router's choices and weights."""
        return self.router is RouterPolicy.FIT

    @property
    def propagates(self) -> bool:
        """Whether the reduced model's hidden states are computed along with the source's."""
        return self.propagate is Propagate.MERGED

    def protected(self, layer: int) -> frozenset[int]:
        """Experts of a decoder layer that are never merged."""
        return frozenset(expert for where, expert in self.protect if where in (None, layer))

    def as_dict(self) -> dict[str, Any]:
        """The choices as JSON values, in the words of the command line."""
        content: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            match field.name:
                case "similarity" if value is not None:
                    content[field.name] = "+".join(value)
                # Results without one are described as they were before there was a choice.
                case "compress" | "align_to" if value is None:
                    continue
                case "protect":
                    named = (f"{'*' if layer is None else layer}:{expert}" for layer, expert in value)
                    content[field.name] = ",".join(named) or None
                case _:
                    content[field.name] = str(value) if isinstance(value, str) else value
        return content
