"""Which method reduces the experts."""

from dataclasses import dataclass

from hcsmoe_hub.options.checks import Count, Natural, check_fields
from hcsmoe_hub.options.choices import (
    Align,
    AlignTo,
    Budget,
    Clustering,
    Distance,
    Dominant,
    Features,
    KMeansStart,
    Layout,
    Linkage,
    Merge,
    Method,
    Preset,
    Propagate,
    Refit,
    RouterPolicy,
    Saliency,
    Similarity,
)
from hcsmoe_hub.options.compression import CompressionText


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodOptions:
    """Which experts are kept or merged, what they become, and how the router follows.

    A choice may be given as a member of its enum or as the word that the command line takes: ``Linkage.WARD`` or
    ``"ward"``. ``None`` leaves it to the preset; what the preset leaves open follows from the other choices. A choice
    that would have no effect is refused when a conversion is planned.

    Attributes:
        preset: The named method to start from. ``None`` is ``hc-refit``; ``reap`` if pruning is asked for; ``hc-smoe``
            if a choice of grouping or merging is given that ``hc-refit`` makes otherwise.
        method: Merge clusters, or prune experts.
        similarity: What experts are compared by; the distances of several are normalised and added. Also one word, or
            words joined with ``+``. The loss linkage compares neurons instead.
        distance: How far apart two experts are.
        clustering: How experts are grouped.
        linkage: How far apart two clusters are, in hierarchical clustering; ``loss`` is what their union would lose.
        kmeans_start: Where the centres of k-means begin.
        dominant: Which expert of a cluster the others follow.
        budget: How many clusters each layer gets.
        max_cluster_size: Maximum number of experts in a cluster.
        protect: ``(layer, expert)`` pairs that are never merged or pruned; a layer of ``None`` stands for all layers.
        layers: MoE layers to convert; the others keep all their experts. Those of an encoder-decoder model are numbered
            through both stacks, the encoder's first.
        merge: How the members of a cluster become one expert.
        dominant_weights: Weight of the dominant expert and of every other one, for ``merge="dominant"``.
        features: What fix-dom and ZipIt match neurons by.
        align: What neurons are matched by when they are permuted before a weighted merge.
        align_to: Whose order of neurons they are permuted into: that of the layer's first expert, or of the dominant
            expert of each cluster.
        saliency: Which experts pruning keeps.
        refit: What is refitted to the original layer's output, in the ``reduced`` layout.
        refit_passes: How often ``refit="block"`` sees the calibration text.
        router: How the router follows, in the ``reduced`` layout.
        propagate: On whose hidden states a router is fitted and a layer is refitted.
        layout: How the result is written; ``factored`` with ``compress``, and ``reduced`` otherwise.
        compress: ``RANK[,SPARSITY]`` of the matrices of all experts: the rank of two factors, as a number or as a
            percentage of the smaller side (``32``, ``25%``), and the share of rows that the sparse part next to them
            loses (``32,0.9`` or ``32,90%``); without it there is no sparse part.
        seed: Seed of every random choice.

    Raises:
        PlanError: If a value is not one that the option takes.
    """

    preset: Preset | None = None
    method: Method | None = None
    similarity: tuple[Similarity, ...] | None = None
    distance: Distance | None = None
    clustering: Clustering | None = None
    linkage: Linkage | None = None
    kmeans_start: KMeansStart | None = None
    dominant: Dominant | None = None
    budget: Budget | None = None
    max_cluster_size: Count | None = None
    protect: tuple[tuple[Natural | None, Natural], ...] = ()
    layers: tuple[Natural, ...] | None = None
    merge: Merge | None = None
    dominant_weights: tuple[float, float] | None = None
    features: Features | None = None
    align: Align | None = None
    align_to: AlignTo | None = None
    saliency: Saliency | None = None
    refit: Refit | None = None
    refit_passes: Count | None = None
    router: RouterPolicy | None = None
    propagate: Propagate | None = None
    layout: Layout | None = None
    compress: CompressionText | None = None
    seed: Natural = 42

    def __post_init__(self) -> None:
        check_fields(self)
