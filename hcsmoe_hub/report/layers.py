"""The MoE layers of a conversion in ``hcsmoe.json``: what became of each, and what its refit did."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Pydantic takes those of Python itself from 3.12 on.
from typing_extensions import TypedDict


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterReport:
    """How the router of one layer was reduced.

    Attributes:
        policy: The rule that made K rows from N; ``unchanged`` where all N are kept, ``kept rows`` after pruning.
        top_k_agreement: Share of the original router's choices that the reduced router keeps, 0 to 1.
        is_fitted: Of ``fit``: whether the rows are fitted ones. They are not where nothing was merged or pruned, where
            a table chooses the experts, or where a fit was worse on held-out calibration text; then the rows that it
            began with stay. ``None`` for other rules.
        top_k_agreement_before: The share with the rows that the fit began with; ``None`` where none was tried.
    """

    policy: str
    top_k_agreement: float
    is_fitted: bool | None = None
    top_k_agreement_before: float | None = None


class ErrorChange(TypedDict):
    """A relative error before and after a refit."""

    before: float
    after: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RefitReport:
    """What refitting one layer did to its error on held-out calibration text.

    Attributes:
        is_kept: Whether it lowered the held-out error, of every domain; otherwise it was dropped.
        error_before: Relative error of the routed output on held-out calibration tokens without it.
        error_after: The same with it.
        fitted_tokens: Tokens that it was fitted to; ``None`` in early reports.
        held_out_tokens: Tokens that it was judged by; ``None`` in early reports.
        rounds: Rounds of least squares that were kept; ``None`` in early reports.
        steps: Steps of gradient descent within the block that were kept.
        strength: Share of the fitted change that was kept, 0 to 1: how far the weights went from the start to the fit;
            ``None`` in early reports and where the fit was dropped.
        domains: The errors by domain of the calibration text; empty in early reports and where domains are unknown.
    """

    is_kept: bool
    error_before: float
    error_after: float
    fitted_tokens: int | None
    held_out_tokens: int | None
    rounds: int | None
    steps: int = 0
    strength: float | None = None
    domains: dict[str, ErrorChange] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReport:
    """Stable ranks of the expert matrices of one layer, ``||W||_F^2 / ||W||_2^2``: how many directions they fill.

    Attributes:
        before: Those of every source expert, by matrix: ``gate`` (where there is one), ``up`` and ``down``.
        after: Those of every expert after merging and alignment, before they became factors.
    """

    before: dict[str, list[float]]
    after: dict[str, list[float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReport:
    """One MoE layer.

    Attributes:
        layer: Index of the decoder layer.
        experts: Experts that the layer has left.
        labels: Cluster of every source expert, numbered by first appearance; -1 for an expert that was pruned.
        dominant: The source expert of every cluster that the others follow; after pruning, the kept expert.
        usage: How often the router chose each source expert on the calibration tokens.
        routing_score: Mean probability of each source expert over all calibration tokens (softmax of the logits);
            ``None`` in early reports.
        saliency: Mean of router weight times output norm over the tokens routed to each source expert.
        dead_experts: Source experts that no calibration token was routed to.
        merge_heights: Linkage distance of every merge.
        tree: The whole dendrogram, ``[left, right, height]`` per merge as scipy numbers them; ``None`` if the method
            has none.
        silhouette: Mean silhouette of the clusters, -1 to 1; ``None`` where it is not defined.
        dunn: Dunn index of the clusters; ``None`` where it is not defined.
        router: How the router was reduced.
        refit: What the refit did; ``None`` without one, or where nothing was merged.
        output_error: Relative error of the new block's routed output against the old one; shared experts, which do not
            change, are left out.
        measured_tokens: Tokens that ``output_error`` and ``top_k_agreement`` were measured on; ``None`` in early
            reports.
        stable_rank: Stable ranks before and after the merge; ``None`` unless the experts became factors.
    """

    layer: int
    experts: int
    labels: list[int]
    dominant: list[int]
    usage: list[int]
    routing_score: list[float] | None
    saliency: list[float]
    dead_experts: list[int]
    merge_heights: list[float]
    tree: list[list[float]] | None
    silhouette: float | None
    dunn: float | None
    router: RouterReport
    refit: RefitReport | None
    output_error: float
    measured_tokens: int | None
    stable_rank: RankReport | None = None

    def members(self) -> list[list[int]]:
        """Source experts of every cluster."""
        members: list[list[int]] = [[] for _ in self.dominant]
        for expert, label in enumerate(self.labels):
            if label >= 0:
                members[label].append(expert)
        return members

    @property
    def pruned(self) -> list[int]:
        """Source experts that were pruned."""
        return [expert for expert, label in enumerate(self.labels) if label < 0]


def report_of(content: Mapping[str, Any]) -> LayerReport:
    """Inverse of ``asdict`` for the report of a layer: numbers keep their types, so that it is written as before."""
    refit, rank = content["refit"], content["stable_rank"]
    return LayerReport(
        **{
            **content,
            "router": RouterReport(**content["router"]),
            "refit": None if refit is None else RefitReport(**refit),
            "stable_rank": None if rank is None else RankReport(**rank),
        }
    )
