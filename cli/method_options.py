"""The options of ``hcsmoe convert`` that choose the method."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import partial
from types import MappingProxyType
from typing import Annotated, Any

import typer

from hcsmoe_hub.cli.expert_lists import parse_layers, parse_protected
from hcsmoe_hub.cli.help_page import ALL_OPTIONS, one_of, show_rare
from hcsmoe_hub.cli.output import print_labelled, stderr_console
from hcsmoe_hub.cli.values import choice, choices, parse_compression, parse_weights, parse_width
from hcsmoe_hub.options import (
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
    MethodOptions,
    Preset,
    Propagate,
    Refit,
    RouterPolicy,
    Saliency,
    Similarity,
)

# Values that say by themselves what they stand for.
NO_MEANINGS: Mapping[StrEnum, str] = MappingProxyType({})

_method = partial(typer.Option, rich_help_panel="Method")
_grouping = partial(typer.Option, rich_help_panel="Grouping")
_merging = partial(typer.Option, rich_help_panel="Merging")
_pruning = partial(typer.Option, rich_help_panel="Pruning")
_scope = partial(typer.Option, rich_help_panel="Layers and router")


def _choice(
    panel: Any, flag: str, kind: type[StrEnum], text: str, default: str, meanings: Mapping[StrEnum, str] = NO_MEANINGS
) -> Any:
    """An option whose value is one of an enum.

    Args:
        panel: Makes an option of a panel.
        flag: Name of the option.
        kind: Its values, which the help lists after ``text``.
        text: What is chosen, without the final period.
        default: What the library takes if the option is not given, in words.
        meanings: What some of the values stand for, in a few words without a comma.
    """
    values = (f"{value} ({meanings[value]})" if value in meanings else value for value in kind)
    return panel(flag, parser=choice(kind), metavar="NAME", help=f"{text}: {one_of(values)}.", show_default=default)


def _warn_of_old_name(value: Any) -> Any:
    """Callback of ``--correct``."""
    if value is not None:
        print_labelled(stderr_console(), "Warning", "yellow", "--correct is now called --refit.")
    return value


ExpertsOption = Annotated[
    int | None,
    _method(
        "--experts", "-e", min=1, metavar="N", show_default="all", help="Experts to keep in every MoE layer, e.g. 4."
    ),
]
ExpertWidthOption = Annotated[
    Any,
    _method(
        "--expert-width",
        parser=parse_width,
        metavar="WIDTH",
        show_default="all",
        help="Neurons to keep in every expert, e.g. 512, or a share of them such as 75%.",
    ),
]
ExpertsPerTokenOption = Annotated[
    int | None,
    _method(
        "--experts-per-token",
        min=1,
        metavar="N",
        show_default="as in the source",
        help="Active experts per token, e.g. 2.",
    ),
]

LikeOption = Annotated[
    str | None,
    _method(
        "--like",
        metavar="RESULT",
        show_default=False,
        help="Apply the choices of another conversion to this model: a folder, a hcsmoe.json, or a Hub repository id.",
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodFlags:
    """A preset and fields of ``MethodOptions``, as they were typed; ``None`` leaves a choice to the preset.

    ``correct`` is the old name of ``refit``; ``help_methods`` ends the command before anything else is read.
    """

    help_methods: Annotated[
        bool,
        typer.Option(
            ALL_OPTIONS,
            metavar="",
            is_eager=True,
            callback=show_rare,
            help="Show this message with all options, those of grouping, merging, pruning and router too, and exit.",
        ),
    ] = False
    preset: Annotated[
        Preset | None,
        _choice(
            _method,
            "--preset",
            Preset,
            "Method to start from, changed by the other options",
            "hc-refit; hc-smoe or reap with options of theirs",
            {
                Preset.HC_REFIT: "cluster by what a merge loses and refit",
                Preset.HC_SMOE: "merge clusters of similar outputs",
                Preset.M_SMOE: "merge groups around dominant experts",
                Preset.REAP: "keep experts by REAP score",
            },
        ),
    ] = None
    method: Annotated[Method | None, _choice(_method, "--method", Method, "How N experts become K", "the preset's")] = (
        None
    )
    refit: Annotated[
        Refit | None,
        _choice(
            _method,
            "--refit",
            Refit,
            "What is then fitted to the original layer's output",
            "the preset's",
            {
                Refit.DOWN: "down projections by least squares",
                Refit.BLOCK: "experts and router by gradient descent",
                Refit.MODEL: "the same, then the whole model on the source's logits",
            },
        ),
    ] = None
    refit_passes: Annotated[
        int | None,
        _method(
            "--refit-passes",
            min=1,
            metavar="N",
            show_default="1",
            help="Passes of --refit block over the text.",
        ),
    ] = None
    correct: Annotated[
        Refit | None, _method("--correct", parser=choice(Refit), hidden=True, callback=_warn_of_old_name)
    ] = None
    clustering: Annotated[
        Clustering | None, _choice(_grouping, "--clustering", Clustering, "How experts are grouped", "hierarchical")
    ] = None
    similarity: Annotated[
        tuple[Similarity, ...] | None,
        _grouping(
            "--similarity",
            parser=choices(Similarity),
            metavar="NAME[+NAME]",
            show_default="none; expert-output with hc-smoe",
            help=f"What experts are compared by, one or several joined with +: {one_of(Similarity)}.",
        ),
    ] = None
    distance: Annotated[
        Distance | None,
        _choice(
            _grouping,
            "--distance",
            Distance,
            "Distance between two experts",
            "none; euclidean with hc-smoe; cosine if single-shot",
        ),
    ] = None
    linkage: Annotated[
        Linkage | None,
        _choice(
            _grouping,
            "--linkage",
            Linkage,
            "What hierarchical clustering unites clusters by",
            "loss; average with hc-smoe",
            {Linkage.LOSS: "what a merge would lose"},
        ),
    ] = None
    kmeans_start: Annotated[
        KMeansStart | None,
        _choice(_grouping, "--kmeans-start", KMeansStart, "Initial centres of k-means", "k-means++"),
    ] = None
    dominant: Annotated[
        Dominant | None,
        _choice(
            _grouping,
            "--dominant",
            Dominant,
            "What makes an expert the dominant one of its cluster",
            "saliency; frequency with hc-smoe; center if the merge follows one",
        ),
    ] = None
    budget: Annotated[
        Budget | None,
        _choice(_grouping, "--budget", Budget, "How many clusters each layer gets, --experts on average", "uniform"),
    ] = None
    max_cluster_size: Annotated[
        int | None,
        _grouping(
            "--max-cluster-size", min=1, metavar="N", show_default="no limit", help="Maximum experts per cluster."
        ),
    ] = None
    merge: Annotated[
        Merge | None,
        _choice(
            _merging,
            "--merge",
            Merge,
            "How the members of a cluster become one expert",
            "neurons; frequency with hc-smoe; membership if fuzzy",
            {Merge.NEURONS: "its best neurons"},
        ),
    ] = None
    dominant_weights: Annotated[
        tuple[float, float] | None,
        _merging(
            "--dominant-weights",
            parser=parse_weights,
            metavar="X,Y",
            show_default=False,
            help="Weights of the dominant expert and of every other one, for --merge dominant, e.g. 2,1.",
        ),
    ] = None
    align: Annotated[
        Align | None,
        _choice(_merging, "--align", Align, "What neurons are matched by before a weighted merge", "none"),
    ] = None
    align_to: Annotated[
        AlignTo | None,
        _choice(
            _merging,
            "--align-to",
            AlignTo,
            "Whose order of neurons --align gives to the members of a cluster",
            "dominant; first with m-smoe",
            {AlignTo.FIRST: "the layer's first expert", AlignTo.DOMINANT: "the cluster's dominant expert"},
        ),
    ] = None
    features: Annotated[
        Features | None,
        _choice(_merging, "--features", Features, "What fix-dom and zipit match neurons by", "activation"),
    ] = None
    saliency: Annotated[
        Saliency | None,
        _choice(_pruning, "--saliency", Saliency, "How pruning selects the experts to keep", "reap"),
    ] = None
    layers: Annotated[
        tuple[int, ...] | None,
        _scope(
            "--layers",
            parser=parse_layers,
            metavar="LIST",
            show_default="all MoE layers",
            help="MoE layers to convert, e.g. 0-15,20; a decoder's numbers follow its encoder's.",
        ),
    ] = None
    protect: Annotated[
        tuple[tuple[int | None, int], ...] | None,
        _scope(
            "--protect",
            parser=parse_protected,
            metavar="LIST",
            show_default="none",
            help="Experts to leave unchanged, as LAYER:EXPERT, e.g. 3:17,*:0-2, or @FILE with such a list.",
        ),
    ] = None
    router: Annotated[
        RouterPolicy | None,
        _choice(
            _scope,
            "--router",
            RouterPolicy,
            "How the router rows of a cluster become one",
            "fit; dominant with hc-smoe; membership if fuzzy",
        ),
    ] = None
    layout: Annotated[
        Layout | None,
        _choice(
            _scope,
            "--layout",
            Layout,
            "How the result is stored",
            "reduced; factored with --compress",
            {
                Layout.REDUCED: "K experts and K router rows",
                Layout.MAPPED: "K experts and all N router rows",
                Layout.FULL: "N experts with copies of merged ones",
                Layout.FACTORED: "K experts of factors from --compress",
            },
        ),
    ] = None
    compress: Annotated[
        str | None,
        _scope(
            "--compress",
            parser=parse_compression,
            metavar="RANK[,SPARSITY]",
            show_default="whole matrices",
            help="Store each expert matrix as two factors of this rank, a number or a percentage of its smaller side, "
            "and the rows that remain at this sparsity, e.g. 32,90%.",
        ),
    ] = None
    propagate: Annotated[
        Propagate | None,
        _choice(
            _scope,
            "--propagate",
            Propagate,
            "Hidden states that --refit and --router fit work on",
            "merged; original with others",
        ),
    ] = None

    def options(self, *, seed: int) -> MethodOptions:
        """The library's options.

        Args:
            seed: Seed of every random choice.

        Raises:
            typer.BadParameter: If ``--refit`` and its old name are given with different values.
        """
        given = asdict(self)
        del given["help_methods"]
        old = given.pop("correct")
        if old is not None and self.refit not in (None, old):
            raise typer.BadParameter(
                f"is the old name of --refit, and --refit {self.refit} is given as well.", param_hint="--correct"
            )
        given["refit"] = self.refit or old
        return MethodOptions(**{name: value for name, value in given.items() if value is not None}, seed=seed)
