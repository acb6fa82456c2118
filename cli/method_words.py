"""A method in words; drawn from the ``method`` of the documents that ``--json`` prints."""

from collections.abc import Iterator, Mapping

from hcsmoe_hub.cli.expert_lists import format_numbers
from hcsmoe_hub.cli.output import format_plural
from hcsmoe_hub.cli.tables import Document
from hcsmoe_hub.options import Align, Budget, Clustering, Dominant, Merge, Method, Propagate, Refit, RouterPolicy

# What makes an expert the one that others gather around.
SEEDS: Mapping[str, str] = {
    Dominant.USAGE: "most used",
    Dominant.ROUTING_SCORE: "highest scored",
    Dominant.SALIENCY: "most salient",
}
# What was fitted to the original layers.
REFITTED: Mapping[str, str] = {
    Refit.DOWN: "down projections refitted",
    Refit.EXPERTS: "experts refitted",
    Refit.BLOCKS: "experts and router refitted",
}
# Letters of a list that a line has room for.
SHORT = 40


def method_line(method: Document) -> str:
    """Every choice of a method that is in force, in words; what a document does not name is left out."""
    if method.get("method") == Method.PRUNE:
        parts = [f"prune by {method['saliency']}"]
        if method.get("router") == RouterPolicy.FIT:
            parts.append("fitted router")
    else:
        parts = [_grouping(method), *_merging(method), f"{method['layout']} layout"]
    if method.get("refit", Refit.NONE) not in (None, Refit.NONE):
        parts.append(REFITTED[method["refit"]])
    if method.get("propagate") == Propagate.MERGED:
        parts.append("fitted on merged hidden states")
    if method.get("protect"):
        named = method["protect"]
        is_short = len(named) <= SHORT
        parts.append(f"protected {named if is_short else format_plural(named.count(',') + 1, 'item')}")
    if method.get("layers") is not None:
        parts.append(f"layers {format_numbers(list(method['layers']))}")
    return ", ".join(parts)


def _grouping(method: Document) -> str:
    clustering, similarity = method["clustering"], method.get("similarity")
    if clustering == Clustering.RANDOM:
        return "random groups"
    details = [method["distance"]]
    if method.get("linkage"):
        details.append(f"{method['linkage']} linkage")
    if method.get("kmeans_start"):
        details.append(f"{method['kmeans_start']} start")
    if clustering == Clustering.SINGLE_SHOT:
        how = f"single-shot around {SEEDS[method['dominant']]} experts"
    else:
        how = f"{clustering} clustering"
    return f"{how} by {similarity} ({', '.join(details)})"


def _merging(method: Document) -> Iterator[str]:
    if method.get("max_cluster_size"):
        yield f"at most {method['max_cluster_size']} per cluster"
    if method.get("budget", Budget.UNIFORM) != Budget.UNIFORM:
        yield f"{method['budget']} budget"
    merge = f"{method['merge']} merge"
    if method.get("dominant_weights"):
        merge += " {:g}:{:g}".format(*method["dominant_weights"])
    if method.get("features"):
        merge += f" by {method['features']}"
    yield merge
    # Single-shot grouping has named it already.
    if method.get("dominant") not in (None, Dominant.USAGE) and method["clustering"] != Clustering.SINGLE_SHOT:
        yield f"dominant by {method['dominant']}"
    if method.get("align", Align.NONE) not in (None, Align.NONE):
        yield f"neurons aligned by {method['align']}"
    if method.get("router") == RouterPolicy.FIT:
        yield "fitted router"
    elif method.get("router") and method["merge"] != Merge.MEMBERSHIP:
        yield f"{method['router']} router"
