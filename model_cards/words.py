"""A method in sentences; every choice has words, and a choice that is unknown is an error."""

from collections.abc import Mapping

from hcsmoe_hub.errors import SourceError
from hcsmoe_hub.model_cards.facts import Document
from hcsmoe_hub.model_cards.markdown import joined
from hcsmoe_hub.options import (
    Align,
    Budget,
    Clustering,
    Distance,
    Dominant,
    Features,
    Merge,
    Refit,
    RouterPolicy,
    Saliency,
    Similarity,
)
from hcsmoe_hub.recipe.recipe import OVERLAPS

SIMILARITIES: Mapping[str, str] = {
    Similarity.EXPERT_OUTPUT: "their mean outputs on calibration text",
    Similarity.WEIGHT: "their weights",
    Similarity.ROUTER_LOGITS: "their router logits on calibration text",
    Similarity.ROUTER_WEIGHT: "their router rows",
}
DISTANCES: Mapping[str, str] = {
    Distance.EUCLIDEAN: "euclidean distance",
    Distance.COSINE: "cosine distance",
    Distance.KL_DIVERGENCE: "Kullback-Leibler divergence",
    Distance.WASSERSTEIN: "Wasserstein distance",
}
CLUSTERINGS: Mapping[str, str] = {
    Clustering.HIERARCHICAL: "by hierarchical clustering ({linkage} linkage, {distance}) of {features}",
    Clustering.KMEANS: "by k-means ({kmeans_start} start, {distance}) of {features}",
    Clustering.FUZZY: "by fuzzy c-means ({distance}) of {features}",
    Clustering.SINGLE_SHOT: "around the {leaders} experts, each joining the nearest by {distance} of {features}",
    Clustering.RANDOM: "at random (seed {seed})",
}
LEADERS: Mapping[str, str] = {
    Dominant.USAGE: "most used",
    Dominant.ROUTING_SCORE: "highest scored",
    Dominant.SALIENCY: "most salient",
    Dominant.CENTER: "most central",
}
BUDGETS: Mapping[str, str] = {
    Budget.UNIFORM: "",
    Budget.FREQUENCY: "Layers keep as many experts as they have among the globally most used, and at least as many as "
    "a token visits.",
    Budget.M_SMOE: "Layers keep as many experts as they have among the globally most used, and at least one.",
}
MERGES: Mapping[str, str] = {
    Merge.FREQUENCY: "the mean of its members, weighted by how often the router chose each",
    Merge.AVERAGE: "the mean of its members",
    Merge.SALIENCY: "the mean of its members, weighted by the sum of router weight times output norm over the tokens "
    "routed to each",
    Merge.DOMINANT: "the mean of its members, the dominant one weighing {dominant:g} and every other {other:g}",
    Merge.MEMBERSHIP: "the mean of all experts, weighted by their membership in it",
    Merge.FIX_DOM: "its dominant expert, each neuron averaged with the neurons of other members that match it best by "
    "{matched}",
    Merge.FIX_DOM_ONE_TO_ONE: "its dominant expert, each neuron averaged with the one neuron of every other member "
    "that is assigned to it by {matched}",
    Merge.ZIPIT: "what is left when its most correlated neurons, by {matched}, are joined until one expert's number "
    "remains",
}
FEATURES: Mapping[str, str] = {
    Features.ACTIVATION: "activations",
    Features.WEIGHT: "weights",
    Features.ACTIVATION_WEIGHT: "activations and weights",
}
ALIGNMENTS: Mapping[str, str] = {
    Align.NONE: "",
    Align.WEIGHT: ", after its members' neurons were permuted towards the dominant expert by their weights",
    Align.ACTIVATION: ", after its members' neurons were permuted towards the dominant expert by their activations",
}
SALIENCIES: Mapping[str, str] = {
    Saliency.FREQUENCY: "the router chose most often",
    Saliency.ROUTING_SCORE: "have the highest mean router probability over all calibration tokens",
    Saliency.REAP: "have the highest mean of router weight times output norm over the tokens routed to them",
    Saliency.RECONSTRUCTION: "together come nearest to the full layer's output",
}
ROUTERS: Mapping[str, str] = {
    RouterPolicy.DOMINANT: "Each cluster has the router row of its dominant expert ({dominant}).",
    RouterPolicy.FREQUENCY: "Each cluster has the mean of its members' router rows, weighted by how often each was "
    "chosen.",
    RouterPolicy.AVERAGE: "Each cluster has the mean of its members' router rows.",
    RouterPolicy.MEMBERSHIP: "Each cluster has the mean of all router rows, weighted by membership.",
    RouterPolicy.FIT: "Router rows were fitted to what the base model's router chooses on calibration text, and how it "
    "weighs it.",
}
REFITS: Mapping[str, str] = {
    Refit.NONE: "",
    Refit.DOWN: "Down projections of the experts{where} were then fitted to the base layers' outputs by least squares.",
    Refit.EXPERTS: "All matrices of the experts{where} were then fitted to the base layers' outputs by least squares.",
    Refit.BLOCKS: "Router and experts{where} were then fitted to the base layers' outputs by gradient descent, every "
    "layer by itself.",
}


def words_of(words: Mapping[str, str], value: str | None, choice: str) -> str:
    """Words for a value of a choice; none for a choice that was not open.

    Raises:
        SourceError: If the value is unknown.
    """
    if value is None:
        return ""
    if value not in words:
        raise SourceError(
            f"the report names the {choice} {value!r}, which this program does not know.", hint="use a newer hcsmoe"
        )
    return words[value]


def grouping(method: Document) -> str:
    """How experts were grouped: continues "Experts were grouped"."""
    distance = method.get("distance")
    if distance in OVERLAPS:
        features = "their outputs, token by token"
    else:
        names = (method.get("similarity") or "").split("+")
        features = joined([words_of(SIMILARITIES, name or None, "similarity") for name in names])
    size = method.get("max_cluster_size")
    sentence = words_of(CLUSTERINGS, method["clustering"], "clustering").format(
        linkage=method.get("linkage"),
        kmeans_start=method.get("kmeans_start"),
        distance=words_of(DISTANCES, distance, "distance"),
        features=features,
        leaders=words_of(LEADERS, method.get("dominant"), "dominant expert"),
        seed=method["seed"],
    )
    return sentence if size is None else f"{sentence}, at most {size} in a group"


def merging(method: Document) -> str:
    """What a group became: continues "Each group became one expert:"."""
    dominant, other = method.get("dominant_weights") or (1, 1)
    matched = words_of(FEATURES, method.get("features"), "features")
    merge = words_of(MERGES, method["merge"], "merge").format(dominant=dominant, other=other, matched=matched)
    return merge + words_of(ALIGNMENTS, method.get("align"), "alignment")


def dominant_words(method: Document) -> str:
    """Which expert of a cluster leads it, as a remark."""
    return f"the {words_of(LEADERS, method.get('dominant'), 'dominant expert')} one"
