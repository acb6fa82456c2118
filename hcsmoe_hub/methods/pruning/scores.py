"""Pruning by a score per expert: usage (F-prune), routing score (S-prune), or REAP's saliency."""

from collections.abc import Collection, Sequence

from hcsmoe_hub.methods.clustering.clusters import DROPPED, Clusters


def keep_only(kept: Collection[int], experts: int) -> Clusters:
    """Every kept expert alone in a cluster, the others dropped."""
    return Clusters.of([expert if expert in kept else DROPPED for expert in range(experts)])


def keep_best(score_E: Sequence[float], count: int, protected: frozenset[int] = frozenset()) -> Clusters:
    """Keeps the experts with the highest scores.

    F-prune ranks by how often the router chose an expert, S-prune (He et al. 2024) by the mean of its routing
    probability over all tokens, REAP (Lasby et al. 2025) by ``S_i = mean_{x routed to i} g_i(x) ||E_i(x)||``.

    Args:
        score_E: The score of every expert; the lowest number wins among equals.
        count: K.
        protected: Experts that are kept whatever their score.

    Returns:
        K clusters of one expert each.
    """
    ranked = sorted(range(len(score_E)), key=lambda expert: (expert not in protected, -score_E[expert], expert))
    return keep_only(ranked[:count], len(score_E))
