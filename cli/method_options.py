"""The options of ``hcsmoe convert`` that choose the method."""

from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import partial
from typing import Annotated, Any

import typer

from hcsmoe_hub.cli.expert_lists import parse_layers, parse_protected
from hcsmoe_hub.cli.values import choice, choices, parse_weights
from hcsmoe_hub.options import (
    Align,
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
    MethodOptions,
    Propagate,
    Refit,
    RouterPolicy,
    Saliency,
    Similarity,
)
from hcsmoe_hub.recipe.presets import Preset, method_options

_method = partial(typer.Option, rich_help_panel="Method")
_grouping = partial(typer.Option, rich_help_panel="Grouping")
_merging = partial(typer.Option, rich_help_panel="Merging")
_pruning = partial(typer.Option, rich_help_panel="Pruning")


def _choice(panel: Any, flag: str, kind: type[StrEnum], text: str, default: str | bool = True) -> Any:
    """An option whose value is one of an enum; ``default`` is told where the library decides it."""
    return panel(flag, parser=choice(kind), metavar=f"[{'|'.join(kind)}]", help=text, show_default=default)


ExpertsOption = Annotated[
    int,
    _method(
        "--experts", "-e", min=1, metavar="INT", show_default=False, help="Experts to keep in every MoE layer, e.g. 4."
    ),
]
ExpertsPerTokenOption = Annotated[
    int | None,
    _method(
        "--experts-per-token",
        min=1,
        metavar="INT",
        show_default="as in the source",
        help="Experts that each token visits, e.g. 2.",
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodFlags:
    """A preset and fields of ``MethodOptions``, as they were typed; ``None`` leaves a choice to the preset."""

    preset: Annotated[
        Preset | None,
        _choice(
            _method,
            "--preset",
            Preset,
            "A method by its name; options of this and the next panels change it.",
            "refit; hc-smoe with options of grouping or merging",
        ),
    ] = None
    method: Annotated[
        Method | None, _choice(_method, "--method", Method, "Merge experts, or drop some.", "the preset's")
    ] = None
    budget: Annotated[
        Budget | None,
        _choice(
            _method, "--budget", Budget, "How many clusters each layer gets; --experts is their average.", "uniform"
        ),
    ] = None
    layers: Annotated[
        tuple[int, ...] | None,
        _method(
            "--layers",
            parser=parse_layers,
            metavar="LIST",
            show_default="all MoE layers",
            help="Decoder layers to convert, e.g. 0-15,20.",
        ),
    ] = None
    protect: Annotated[
        tuple[tuple[int | None, int], ...] | None,
        _method(
            "--protect",
            parser=parse_protected,
            metavar="LIST|@FILE",
            show_default="none",
            help="Experts to leave alone, e.g. 3:17,*:0-2 (LAYER:EXPERT), or a file of them.",
        ),
    ] = None
    router: Annotated[
        RouterPolicy | None,
        _choice(
            _method,
            "--router",
            RouterPolicy,
            "How a cluster's router rows become one.",
            "dominant; membership if fuzzy",
        ),
    ] = None
    layout: Annotated[
        Layout | None,
        _choice(
            _method,
            "--layout",
            Layout,
            "Fewer router rows, all of them and a map, or copies of merged experts.",
            "reduced",
        ),
    ] = None
    refit: Annotated[
        Refit | None,
        _choice(
            _method,
            "--refit",
            Refit,
            "What is fitted to the original layer's output: down projections or whole experts by least squares, or "
            "the block by gradient descent.",
            "the preset's",
        ),
    ] = None
    propagate: Annotated[
        Propagate | None,
        _choice(_method, "--propagate", Propagate, "Whose hidden states --refit and --router fit work on.", "original"),
    ] = None
    clustering: Annotated[
        Clustering | None, _choice(_grouping, "--clustering", Clustering, "How experts are grouped.", "hierarchical")
    ] = None
    similarity: Annotated[
        tuple[Similarity, ...] | None,
        _grouping(
            "--similarity",
            parser=choices(Similarity),
            metavar=f"[{'|'.join(Similarity)}]",
            show_default="expert-output",
            help="What experts are compared by; join several with +.",
        ),
    ] = None
    distance: Annotated[
        Distance | None,
        _choice(
            _grouping,
            "--distance",
            Distance,
            "How far apart two experts are.",
            "euclidean; cosine if single-shot",
        ),
    ] = None
    linkage: Annotated[
        Linkage | None,
        _choice(_grouping, "--linkage", Linkage, "How far apart two clusters are, if hierarchical.", "average"),
    ] = None
    kmeans_start: Annotated[
        KMeansStart | None,
        _choice(_grouping, "--kmeans-start", KMeansStart, "Where the centres of k-means begin.", "k-means++"),
    ] = None
    dominant: Annotated[
        Dominant | None,
        _choice(
            _grouping,
            "--dominant",
            Dominant,
            "Which expert leads its cluster.",
            "usage; center if the merge follows one",
        ),
    ] = None
    max_cluster_size: Annotated[
        int | None,
        _grouping(
            "--max-cluster-size", min=1, metavar="INT", show_default="no limit", help="Most experts of one cluster."
        ),
    ] = None
    merge: Annotated[
        Merge | None,
        _choice(
            _merging,
            "--merge",
            Merge,
            "How the members of a cluster become one expert.",
            "frequency; membership if fuzzy",
        ),
    ] = None
    dominant_weights: Annotated[
        tuple[float, float] | None,
        _merging(
            "--dominant-weights",
            parser=parse_weights,
            metavar="X,Y",
            show_default=False,
            help="Weight of the dominant expert and of each other one, for --merge dominant, e.g. 2,1.",
        ),
    ] = None
    align: Annotated[
        Align | None,
        _choice(
            _merging, "--align", Align, "What neurons are matched by, to reorder them before a weighted merge.", "none"
        ),
    ] = None
    features: Annotated[
        Features | None,
        _choice(_merging, "--features", Features, "What fix-dom and zipit match neurons by.", "activation"),
    ] = None
    saliency: Annotated[
        Saliency | None,
        _choice(_pruning, "--saliency", Saliency, "Which experts --method prune keeps.", "reap"),
    ] = None

    def options(self, *, seed: int) -> MethodOptions:
        """The library's options.

        Args:
            seed: Seed of every random choice.
        """
        return method_options(**asdict(self), seed=seed)
