"""The content of ``hcsmoe.json``, and nothing that was not measured.

Every key is described here once: ``read_report`` validates a file against these classes.
"""

from dataclasses import asdict, dataclass, field, replace
from typing import Any, NotRequired

# Pydantic takes those of Python itself from 3.12 on.
from typing_extensions import TypedDict

from hcsmoe_hub.report.layers import LayerReport
from hcsmoe_hub.report.recovery import RecoveryRecord
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
    ``width_before`` and ``width_after`` are there where experts are narrower: the neurons of one expert.
    """

    per_token_before: int
    per_token_after: int
    moe_layers: int
    mtp_layers: NotRequired[int]
    width_before: NotRequired[int]
    width_after: NotRequired[int]


class TargetCandidate(TypedDict):
    """Experts that meet a target: ``experts`` of them per layer, of ``width`` neurons each, and what the result has.

    ``predicted_error`` is the share of the routed output that is lost, as predicted before anything was converted; null
    where there was nothing to choose.
    """

    experts: int
    width: int
    parameters: int
    active_parameters: int
    weights_bytes: int
    predicted_error: float | None


class TargetRecord(TypedDict):
    """What a result was to keep to: ``size``, ``parameters``, ``active`` or ``ratio``, at most ``value``.

    ``chosen`` is the place of the converted one among the ``candidates``, most experts first; null in a dry run whose
    choice is still open.
    """

    limit: str
    value: float
    chosen: int | None
    candidates: list[TargetCandidate]


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


class LikeRecord(TypedDict):
    """Whose choices a conversion applied: ``repo_id`` or ``path``, the name of a folder or a report.

    ``sha256`` is that of its ``hcsmoe.json``; ``neurons`` says whether its choice of neurons was applied as well.
    """

    repo_id: NotRequired[str]
    path: NotRequired[str]
    revision: str | None
    sha256: str
    neurons: bool


class NeuronRecord(Change):
    """The file that lists the source of every neuron: its digest and size; and the neurons of an expert."""

    sha256: str
    bytes: int


class MethodRecord(TypedDict):
    """Every choice in force, by the names of ``MethodOptions``; null where the others leave nothing to choose.

    ``refit_passes`` is absent in early reports, and ``compress`` where experts did not become factors. ``align_to`` is
    absent where neurons stay in their order, and in early reports, whose experts were aligned to the dominant one.
    ``dtype`` is how the weights of a quantised source are written; absent or null in early reports: in bfloat16.
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
    align_to: NotRequired[str | None]
    saliency: str | None
    refit: str | None
    refit_passes: NotRequired[int | None]
    router: str | None
    propagate: str | None
    layout: str
    compress: NotRequired[str | None]
    dtype: NotRequired[str | None]
    seed: int


class CompressionRecord(TypedDict):
    """What every expert matrix became: two factors of a rank, and rows that stay whole.

    ``incoming_rows`` are those of gate and up, ``outgoing_rows`` those of the down projection. The operations are those
    of the routed experts of all layers for one token, two for every number of a matrix, a factor or a row.
    """

    rank: int
    incoming_rows: int
    outgoing_rows: int
    expert_flops_per_token: Change


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
        like: Whose choices were applied; ``None`` if they were made here.
        neurons: The file that lists where the neurons of the experts come from; ``None`` where none were chosen, and in
            early reports.
        compression: What the matrices of the experts became; ``None`` where they stayed whole.
        target: What the result was to keep to, and how its shape was chosen; ``None`` where numbers were given.
        recovery: How the result was trained after its conversion; ``None`` if it was not.
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
    like: LikeRecord | None = None
    neurons: NeuronRecord | None = None
    compression: CompressionRecord | None = None
    target: TargetRecord | None = None
    recovery: RecoveryRecord | None = None
    schema_version: int = SCHEMA_VERSION
    pushed: Pushed | None = None

    def as_dict(self) -> dict[str, Any]:
        """The content of ``hcsmoe.json`` as JSON values, ``schema_version`` first."""
        content = asdict(replace(self, pushed=None))
        del content["pushed"]
        for key in ("refit_model", "like", "neurons", "compression", "target", "recovery"):
            if content[key] is None:
                del content[key]
        for layer in content["layers"]:
            if layer["stable_rank"] is None:
                del layer["stable_rank"]
        return {"schema_version": content.pop("schema_version"), **content}
