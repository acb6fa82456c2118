"""The content of ``hcsmoe.json``, and nothing that was not measured.

Every key is described here once: ``read_report`` validates a file against these classes.
"""

from dataclasses import asdict, dataclass, field, replace
from typing import Any, NotRequired

# Pydantic takes those of Python itself from 3.12 on.
from typing_extensions import TypedDict

from hcsmoe_hub.report.texts import CalibrationRecord, Measured

SCHEMA_VERSION = 2

Words = str | list[str] | None


class Tool(TypedDict):
    """Name and version of the program that wrote a file."""

    name: str
    version: str


class Change(TypedDict):
    """A number before and after a conversion."""

    before: int
    after: int


class ExpertCounts(Change):
    """Experts per MoE layer (after a budget the average), experts per token, and the number of MoE layers.

    ``mtp_layers`` is there with a multi-token prediction head whose experts were reduced alike: its number of layers.
    """

    per_token_before: int
    per_token_after: int
    moe_layers: int
    mtp_layers: NotRequired[int]


class SourceRecord(TypedDict):
    """What was converted: ``repo_id`` or ``path``, the name of a folder; and what its card says of licence and use.

    The keys of the licence are absent if the card could not be read, and null where it says nothing.
    """

    repo_id: NotRequired[str | None]
    path: NotRequired[str | None]
    revision: NotRequired[str | None]
    fingerprint: NotRequired[str | None]
    model_type: str
    license: NotRequired[Words]
    license_name: NotRequired[str | None]
    license_link: NotRequired[str | None]
    language: NotRequired[Words]
    pipeline_tag: NotRequired[str | None]
    gated: NotRequired[bool]


class MethodRecord(TypedDict):
    """Every choice in force, by the names of ``MethodOptions``; null where the others leave nothing to choose.

    ``refit_passes`` is absent in early reports. ``dtype`` is how the weights of a quantised source are written; absent
    or null in early reports: in bfloat16.
    """

    method: str
    similarity: str | None
    distance: str | None
    clustering: str | None
    linkage: str | None
    kmeans_start: str | None
    dominant: str | None
    budget: str
    max_cluster_size: int | None
    protect: str | None
    layers: list[int] | None
    merge: str | None
    dominant_weights: list[float] | None
    features: str | None
    align: str | None
    saliency: str | None
    refit: str | None
    refit_passes: NotRequired[int | None]
    router: str | None
    propagate: str | None
    layout: str
    dtype: NotRequired[str | None]
    seed: int


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
class DomainDivergence:
    """How far the next-token distributions of a result are from its source's on held-out calibration text of a domain.

    Attributes:
        domain: The domain; empty where it is unknown.
        kl_before: Mean KL divergence per token before the whole model was trained, in nats.
        kl_after: The same afterwards; equal to ``kl_before`` where the training was dropped.
    """

    domain: str
    kl_before: float
    kl_after: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRefitReport:
    """What training the whole reduced model on the logits of its source did.

    Attributes:
        is_kept: Whether it brought the result nearer to the source in every domain of held-out calibration text;
            otherwise it was dropped.
        steps: Steps of gradient descent that were kept, 0 if none were.
        rate: Largest step of the last attempt, as a share of the root mean square of each tensor.
        fitted_tokens: Calibration tokens that it was trained on.
        visited_tokens: The same, counted as often as they were seen.
        held_out_tokens: Calibration tokens that it was judged by.
        domains: What it did in each domain.
        seconds: Time that it took, loading included.
    """

    is_kept: bool
    steps: int
    rate: float
    fitted_tokens: int
    visited_tokens: int
    held_out_tokens: int
    domains: list[DomainDivergence]
    seconds: float


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Pushed:
    """What a push did.

    Attributes:
        repo_id: ``namespace/name``.
        private: Whether the repository is private.
        revision: Branch that holds the result; of a pull request, its ref.
        commit: Hash of the commit that holds it.
        url: Address of that commit.
        pull_request: Address of the pull request, if there is one.
        changed: Whether there is a new commit; otherwise everything was there already.
        files: Names of the files of the result.
        bytes: Size of all of them.
        bytes_sent: Bytes of content that were sent; ``None`` where the Xet client sent them, which does not report it.
        deleted: Files of an older checkpoint that the commit deleted.
        left_out: Files of the folder that are not part of the checkpoint and were not pushed.
    """

    repo_id: str
    private: bool
    revision: str
    commit: str
    url: str
    pull_request: str | None
    changed: bool
    files: list[str]
    bytes: int
    bytes_sent: int | None
    deleted: list[str]
    left_out: list[str]

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionReport:
    """Everything that a result remembers of its conversion.

    Attributes:
        tool: Name and version of this program.
        source: What was converted, and what its card said of licence and use.
        experts: Experts per MoE layer and per token, before and after.
        parameters: All parameters, before and after.
        active_parameters: Parameters that one token uses, before and after.
        weights_bytes: Bytes of all stored tensors, before and after.
        method: Every choice in force.
        calibration: What the experts were observed on.
        measured: What the conversion cost; ``None`` if that was not measured, as in early reports.
        not_measured: Why it was not measured; ``None`` if it was, and in early reports.
        layers: The MoE layers.
        dropped_tensors: Reasons by the names of the source's tensors that were left out.
        left_files: Reasons by the names of the source's files that were not copied; empty in early reports.
        warnings: What the conversion warned about.
        timings_seconds: Seconds by stage.
        peak_memory_bytes: Peak of the process, and of every accelerator.
        versions: Python and the libraries.
        refit_model: What the training of the whole model did after its layers were converted, which is what ``layers``
            describe; ``None`` without one, or where nothing was merged or pruned.
        schema_version: Version of the format.
        pushed: Where the result is on the Hub; not part of ``hcsmoe.json``, which is pushed itself.
    """

    tool: Tool
    source: SourceRecord
    experts: ExpertCounts
    parameters: Change
    active_parameters: Change
    weights_bytes: Change
    method: MethodRecord
    calibration: CalibrationRecord
    measured: Measured | None = None
    not_measured: str | None = None
    layers: list[LayerReport]
    dropped_tensors: dict[str, str]
    left_files: dict[str, str] = field(default_factory=dict)
    warnings: list[str]
    timings_seconds: dict[str, float]
    peak_memory_bytes: dict[str, int]
    versions: dict[str, str]
    refit_model: ModelRefitReport | None = None
    schema_version: int = SCHEMA_VERSION
    pushed: Pushed | None = None

    def as_dict(self) -> dict[str, Any]:
        """The content of ``hcsmoe.json`` as JSON values, ``schema_version`` first."""
        content = asdict(replace(self, pushed=None))
        del content["pushed"]
        if self.refit_model is None:
            del content["refit_model"]
        return {"schema_version": content.pop("schema_version"), **content}
