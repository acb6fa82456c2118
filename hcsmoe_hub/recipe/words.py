"""A recipe in words: a line for a terminal, sentences for a card.

Every value of a choice has one record with both.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from hcsmoe_hub.machine.units import format_list, format_numbers, format_percent, format_plural
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
    Linkage,
    Merge,
    Method,
    Propagate,
    Refit,
    RouterPolicy,
    Saliency,
    Similarity,
)
from hcsmoe_hub.recipe.recipe import OVERLAPS, Recipe

# Letters of a list that a line has room for.
_SHORT = 40


@dataclass(frozen=True, slots=True)
class Words:
    """Words for one value of a choice.

    Attributes:
        line: For a line of a terminal; empty where the line leaves the choice out.
        card: For a sentence of a card; empty where there is nothing to say.
    """

    line: str
    card: str


SIMILARITIES: Mapping[Similarity, Words] = {
    Similarity.EXPERT_OUTPUT: Words("expert-output", "their mean outputs on calibration text"),
    Similarity.WEIGHT: Words("weight", "their weights"),
    Similarity.ROUTER_LOGITS: Words("router-logits", "their router logits on calibration text"),
    Similarity.ROUTER_WEIGHT: Words("router-weight", "their router rows"),
}
DISTANCES: Mapping[Distance, Words] = {
    Distance.EUCLIDEAN: Words("euclidean", "Euclidean distance"),
    Distance.COSINE: Words("cosine", "cosine distance"),
    Distance.KL_DIVERGENCE: Words("kl-divergence", "Kullback-Leibler divergence"),
    Distance.WASSERSTEIN: Words("wasserstein", "Wasserstein distance"),
}
CLUSTERINGS: Mapping[Clustering, Words] = {
    Clustering.HIERARCHICAL: Words(
        "hierarchical clustering", "by hierarchical clustering ({linkage} linkage, {distance}) of {features}"
    ),
    Clustering.KMEANS: Words("kmeans clustering", "by k-means ({start} start, {distance}) of {features}"),
    Clustering.FUZZY: Words("fuzzy clustering", "by fuzzy c-means ({distance}) of {features}"),
    Clustering.SINGLE_SHOT: Words(
        "single-shot around {leaders} experts",
        "around the {leaders} experts, each joining the nearest by {distance} of {features}",
    ),
    Clustering.RANDOM: Words("random groups", "at random (seed {seed})"),
}
# Hierarchical clustering that measures no distances.
LOSS_LINKAGE = Words(
    "hierarchical clustering by loss",
    "by hierarchical clustering, always uniting the two groups that lose least of the layer's output energy on "
    "calibration text",
)
# The experts that others gather around or follow.
LEADERS: Mapping[Dominant, Words] = {
    Dominant.FREQUENCY: Words("most used", "most used"),
    Dominant.ROUTING_SCORE: Words("highest scored", "highest scored"),
    Dominant.SALIENCY: Words("most salient", "most salient"),
    Dominant.CENTER: Words("most central", "most central"),
}
BUDGETS: Mapping[Budget, Words] = {
    Budget.UNIFORM: Words("", ""),
    Budget.FREQUENCY: Words(
        "frequency budget",
        "Layers keep as many experts as they have among the globally most used, and at least as many as are active "
        "per token.",
    ),
    Budget.M_SMOE: Words(
        "m-smoe budget",
        "Layers keep as many experts as they have among the globally most used, and at least one.",
    ),
}
MERGES: Mapping[Merge, Words] = {
    Merge.FREQUENCY: Words(
        "frequency merge", "the mean of its members, weighted by how often the router chose each of them"
    ),
    Merge.AVERAGE: Words("average merge", "the mean of its members"),
    Merge.SALIENCY: Words(
        "saliency merge",
        "the mean of its members, weighted by the sum of router weight times output norm over the tokens routed to "
        "each of them",
    ),
    Merge.DOMINANT: Words(
        "dominant merge {dominant:g}:{other:g}",
        "the mean of its members, with weight {dominant:g} for the dominant one and {other:g} for every other",
    ),
    Merge.MEMBERSHIP: Words("membership merge", "the mean of all experts, weighted by their membership in it"),
    Merge.FIX_DOM: Words(
        "fix-dom merge by {features}",
        "its dominant expert, each neuron averaged with the neurons of other members that match it best by {matched}",
    ),
    Merge.FIX_DOM_ONE_TO_ONE: Words(
        "fix-dom-one-to-one merge by {features}",
        "its dominant expert, each neuron averaged with the one neuron of every other member that is assigned to it "
        "by {matched}",
    ),
    Merge.ZIPIT: Words(
        "zipit merge by {features}",
        "the neurons of its members, joined pair by pair, the most correlated by {matched} first, until as many are "
        "left as one expert has",
    ),
    Merge.NEURONS: Words(
        "best-neurons merge",
        "the neurons of its members that contribute most to the output of the layer, as many as one expert has",
    ),
}
FEATURES: Mapping[Features, Words] = {
    Features.ACTIVATION: Words("activation", "activations"),
    Features.WEIGHT: Words("weight", "weights"),
    Features.ACTIVATION_WEIGHT: Words("activation+weight", "activations and weights"),
}
ALIGNMENTS: Mapping[Align, Words] = {
    Align.NONE: Words("", ""),
    Align.WEIGHT: Words(
        "neurons aligned{anchor} by weight",
        ", after its members' neurons were permuted towards {anchor} by their weights",
    ),
    Align.ACTIVATION: Words(
        "neurons aligned{anchor} by activation",
        ", after its members' neurons were permuted towards {anchor} by their activations",
    ),
}
# The experts whose order of neurons others take.
ANCHORS: Mapping[AlignTo, Words] = {
    AlignTo.FIRST: Words(" to the first expert", "the first expert of the layer"),
    AlignTo.DOMINANT: Words("", "the dominant expert"),
}
SALIENCIES: Mapping[Saliency, Words] = {
    Saliency.FREQUENCY: Words("prune by frequency", "the router chose most often"),
    Saliency.ROUTING_SCORE: Words(
        "prune by routing-score", "have the highest mean router probability over all calibration tokens"
    ),
    Saliency.REAP: Words(
        "prune by reap",
        "have the highest mean of router weight times output norm over the tokens routed to them",
    ),
    Saliency.MAN: Words("prune by man", "have the highest mean output norm over the tokens routed to them"),
    Saliency.TOTAL_MASS: Words(
        "prune by total-mass", "have the highest sum of router weights over all calibration tokens"
    ),
    Saliency.GRAM: Words("prune by gram", "together leave out the least energy of the full layer's output"),
    Saliency.OMP: Words(
        "prune by omp", "together come nearest to the output of the full layer, each scaled by its best factor"
    ),
    Saliency.RECONSTRUCTION: Words("prune by reconstruction", "together come nearest to the output of the full layer"),
}
ROUTERS: Mapping[RouterPolicy, Words] = {
    RouterPolicy.DOMINANT: Words(
        "dominant router", "Each cluster has the router row of its dominant expert (the {leaders} one)."
    ),
    RouterPolicy.FREQUENCY: Words(
        "frequency router",
        "Each cluster has the mean of its members' router rows, weighted by how often each was chosen.",
    ),
    RouterPolicy.AVERAGE: Words("average router", "Each cluster has the mean of its members' router rows."),
    RouterPolicy.MEMBERSHIP: Words(
        "membership router", "Each cluster has the mean of all router rows, weighted by membership."
    ),
    RouterPolicy.FIT: Words(
        "fitted router",
        "Router rows were fitted to the base model's router: which experts it chooses on calibration text, and with "
        "which weights.",
    ),
}
REFITS: Mapping[Refit | FormerRefit, Words] = {
    Refit.NONE: Words("", ""),
    Refit.DOWN: Words(
        "down projections refitted",
        "The down projections of the experts{where} were then refitted to the outputs of the base layers by least "
        "squares.",
    ),
    FormerRefit.EXPERTS: Words(
        "experts refitted",
        "All matrices of the experts{where} were then refitted to the outputs of the base layers by least squares.",
    ),
    Refit.BLOCK: Words(
        "experts and router refitted",
        "The router and the experts{where} were then refitted to the outputs of the base layers by gradient descent, "
        "one layer at a time.",
    ),
    FormerRefit.BLOCKS: Words(
        "experts and router refitted",
        "The router and the experts{where} were then refitted to the outputs of the base layers by gradient descent, "
        "one layer at a time.",
    ),
    Refit.MODEL: Words(
        "experts and router refitted, then the whole model",
        "The router and the experts{where} were then refitted to the outputs of the base layers by gradient descent, "
        "one layer at a time.",
    ),
}
PROPAGATIONS: Mapping[Propagate, Words] = {
    Propagate.ORIGINAL: Words("", ""),
    Propagate.MERGED: Words(
        "refitted on merged hidden states",
        "Each layer was fitted on the hidden states that the reduced layers before it produce.",
    ),
}


def method_line(recipe: Recipe) -> str:
    """Every choice in force on one line."""
    if recipe.method is Method.PRUNE and recipe.saliency is not None:
        parts = [SALIENCIES[recipe.saliency].line]
        parts += [ROUTERS[recipe.router].line] if recipe.router is RouterPolicy.FIT else []
    else:
        parts = [_grouping_line(recipe), *_merging_parts(recipe), f"{recipe.layout} layout"]
    if recipe.compress is not None:
        parts.append(f"compressed to {compression_line(recipe.compress)}")
    if recipe.refit is not None:
        parts.append(REFITS[recipe.refit].line)
    if recipe.propagate is not None:
        parts.append(PROPAGATIONS[recipe.propagate].line)
    if recipe.protect:
        named = recipe.as_dict()["protect"]
        parts.append(f"protected {named if len(named) <= _SHORT else format_plural(len(recipe.protect), 'item')}")
    if recipe.layers is not None:
        parts.append(f"layers {format_numbers(recipe.layers)}")
    return ", ".join(part for part in parts if part)


def compression_line(compress: str) -> str:
    """What every expert matrix is reduced to.

    Args:
        compress: The choice, ``32,0.9`` say.
    """
    found = Compression.parse(compress)
    rank = f"rank {compress.partition(',')[0]}"
    return rank if found.sparsity is None else f"{rank} and {format_percent(1 - found.sparsity)} of the rows"


def compression(recipe: Recipe) -> str:
    """What the expert matrices became, as a sentence; empty if they stayed whole."""
    if recipe.compress is None:
        return ""
    found = Compression.parse(recipe.compress)
    rank = f"{recipe.compress.partition(',')[0]}{' of its smaller side' if found.rank is None else ''}"
    rows = "" if found.sparsity is None else f" and {format_percent(1 - found.sparsity)} of its rows, kept whole"
    return f"Every expert matrix is stored as two factors of rank {rank}{rows}."


def _grouping_line(recipe: Recipe) -> str:
    if recipe.clustering is None:
        return "merge"
    if recipe.linkage is Linkage.LOSS:
        return LOSS_LINKAGE.line
    leaders = "" if recipe.dominant is None else LEADERS[recipe.dominant].line
    how = CLUSTERINGS[recipe.clustering].line.format(leaders=leaders)
    if recipe.similarity is None or recipe.distance is None:
        return how
    details = [DISTANCES[recipe.distance].line]
    details += [f"{recipe.linkage} linkage"] if recipe.linkage is not None else []
    details += [f"{recipe.kmeans_start} start"] if recipe.kmeans_start is not None else []
    similarity = "+".join(SIMILARITIES[kind].line for kind in recipe.similarity)
    return f"{how} by {similarity} ({', '.join(details)})"


def _merging_parts(recipe: Recipe) -> Iterator[str]:
    if recipe.max_cluster_size is not None:
        yield f"at most {recipe.max_cluster_size} per cluster"
    yield BUDGETS[recipe.budget].line
    if recipe.merge is not None:
        yield _filled(MERGES[recipe.merge].line, recipe)
    # Single-shot grouping has named it already.
    if recipe.dominant not in (None, Dominant.FREQUENCY) and recipe.clustering is not Clustering.SINGLE_SHOT:
        yield f"dominant by {recipe.dominant}"
    if recipe.align is not None:
        anchor = "" if recipe.align_to is None else ANCHORS[recipe.align_to].line
        yield ALIGNMENTS[recipe.align].line.format(anchor=anchor)
    # A membership router is the only one that such a merge can have.
    if recipe.router is not None and recipe.router is not RouterPolicy.MEMBERSHIP:
        yield ROUTERS[recipe.router].line


def _filled(words: str, recipe: Recipe) -> str:
    """Words of a merge with the numbers and features of a recipe."""
    dominant, other = recipe.dominant_weights or (1, 1)
    features = Words("", "") if recipe.features is None else FEATURES[recipe.features]
    return words.format(dominant=dominant, other=other, features=features.line, matched=features.card)


def grouping(recipe: Recipe) -> str:
    """How experts were grouped: continues "Experts were grouped"."""
    if recipe.clustering is None:
        return ""
    sentence = LOSS_LINKAGE.card if recipe.linkage is Linkage.LOSS else _distances_in_words(recipe, recipe.clustering)
    size = recipe.max_cluster_size
    return sentence if size is None else f"{sentence}, at most {size} in a group"


def _distances_in_words(recipe: Recipe, clustering: Clustering) -> str:
    """How experts were grouped by distances, or at random."""
    if recipe.distance in OVERLAPS:
        features = "their outputs, token by token"
    else:
        features = format_list([SIMILARITIES[kind].card for kind in recipe.similarity or ()] or [""])
    return CLUSTERINGS[clustering].card.format(
        linkage=recipe.linkage,
        start=recipe.kmeans_start,
        distance="" if recipe.distance is None else DISTANCES[recipe.distance].card,
        features=features,
        leaders="" if recipe.dominant is None else LEADERS[recipe.dominant].card,
        seed=recipe.seed,
    )


def merging(recipe: Recipe) -> str:
    """What a group became: continues "each group became"."""
    if recipe.merge is None:
        return ""
    aligned = "" if recipe.align is None else ALIGNMENTS[recipe.align].card
    anchor = "" if recipe.align_to is None else ANCHORS[recipe.align_to].card
    return _filled(MERGES[recipe.merge].card, recipe) + aligned.format(anchor=anchor)


def routing(recipe: Recipe) -> str:
    """How router rows were made, as a sentence; of kept experts, what became of the others' rows."""
    if recipe.router is None:
        return "The router rows of pruned experts were removed; the others are unchanged."
    leaders = "" if recipe.dominant is None else LEADERS[recipe.dominant].card
    return ROUTERS[recipe.router].card.format(leaders=leaders)
