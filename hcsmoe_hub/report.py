"""What a conversion did: the content of ``hcsmoe.json``, and nothing that was not measured."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

SCHEMA_VERSION = 2
REPORT_FILE = "hcsmoe.json"
FIGURE_FILE = "hcsmoe.png"
EVALUATION_FILE = "hcsmoe-evaluation.json"
# A path on somebody's machine, however it begins.
_PLACE = re.compile(r"(?<![\w:/.~-])(?:~|\.{1,2})?/(?:[^\s/]+/)*([^\s/]+)")


def strip_paths(text: str, names: Mapping[str, str]) -> str:
    """A message as reports keep it: files and folders without what they lie in.

    Args:
        text: The message.
        names: Names by the path that the message may hold, for paths that cannot be told from other words.
    """
    for path in sorted(names, key=len, reverse=True):
        text = text.replace(path, names[path])
    return _PLACE.sub(r"\1", text)


def upgrade(content: dict[str, Any]) -> dict[str, Any]:
    """The content of a report in this version's words; version 1 called a refit a correction."""
    if content.get("schema_version") != 1:
        return content
    method = {{"correct": "refit"}.get(key, key): value for key, value in content["method"].items()}
    layers = [
        {{"correction": "refit"}.get(key, key): value for key, value in layer.items()} for layer in content["layers"]
    ]
    return {**content, "schema_version": SCHEMA_VERSION, "method": method, "layers": layers}


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterReport:
    """How the router of one layer followed.

    Attributes:
        policy: The rule that made K rows from N; ``unchanged`` where all N are kept, ``kept rows`` after pruning.
        top_k_agreement: Share of the clusters chosen by the full router that the reduced one chooses too, 0 to 1.
        is_fitted: Of ``fit``: whether the rows are fitted ones. They are not where nothing was merged or dropped, where
            a table chooses the experts, or where a fit was worse on held-out calibration text; then the rows that it
            begins with stay. ``None`` for other rules.
        top_k_agreement_before: The share with the rows that the fit begins with; ``None`` where none was tried.
    """

    policy: str
    top_k_agreement: float
    is_fitted: bool | None = None
    top_k_agreement_before: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RefitReport:
    """What a refit of one layer did on calibration text that it was not fitted to.

    Attributes:
        is_kept: Whether it lowered the error there; otherwise it was dropped.
        error_before: Relative error of the routed output on held-out calibration tokens without it.
        error_after: The same with it.
        fitted_tokens: Tokens that it was fitted to.
        held_out_tokens: Tokens that it was judged by.
        rounds: Rounds of least squares that were kept.
        steps: Steps of gradient descent within the block that were kept.
    """

    is_kept: bool
    error_before: float
    error_after: float
    fitted_tokens: int
    held_out_tokens: int
    rounds: int
    steps: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReport:
    """One MoE layer.

    Attributes:
        layer: Index of the decoder layer.
        experts: Experts that the layer has left.
        labels: Cluster of every source expert, numbered by first appearance; -1 for an expert that was pruned.
        dominant: The source expert of every cluster that the others follow; of pruning, the kept expert.
        usage: How often the router chose each source expert on the calibration tokens.
        routing_score: Mean probability of each source expert over all calibration tokens (softmax of the logits).
        saliency: Mean of router weight times output norm over the tokens routed to each source expert.
        dead_experts: Source experts that no calibration token was routed to.
        merge_heights: Linkage distance of every merge.
        tree: The whole dendrogram, ``[left, right, height]`` per merge as scipy numbers them; ``None`` if the method
            has none.
        silhouette: Mean silhouette of the clusters, -1 to 1; ``None`` where it is not defined.
        dunn: Dunn index of the clusters; ``None`` where it is not defined.
        router: How the router followed.
        refit: What the refit did; ``None`` without one, or where nothing was merged.
        output_error: Relative error of the new block's routed output against the old one; shared experts, which do not
            change, are left out.
        measured_tokens: Tokens that ``output_error`` and ``top_k_agreement`` were measured on.
    """

    layer: int
    experts: int
    labels: list[int]
    dominant: list[int]
    usage: list[int]
    routing_score: list[float]
    saliency: list[float]
    dead_experts: list[int]
    merge_heights: list[float]
    tree: list[list[float]] | None
    silhouette: float | None
    dunn: float | None
    router: RouterReport
    refit: RefitReport | None
    output_error: float
    measured_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pushed:
    """What a push did.

    Attributes:
        repo_id: ``namespace/name``.
        private: Whether the repository is a private one.
        revision: Branch that holds the result; of a pull request, its ref.
        commit: Hash of the commit that holds it.
        url: Address of that commit.
        pull_request: Address of the pull request, if there is one.
        changed: Whether there is a new commit; otherwise everything was there.
        files: Names of the files of the result.
        bytes: Size of all of them.
        bytes_sent: Bytes of content that were sent; ``None`` where the Xet client has sent them and does not tell.
        deleted: Files of an older checkpoint that the commit deleted.
        left_out: Files of the folder that belong to no checkpoint, and stayed.
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
    """Everything about a conversion that its result should remember.

    Attributes:
        tool: Name and version of this program.
        source: What was converted, and what its card said of licence and use; see ``describe_source``.
        experts: Experts per MoE layer and per token, before and after.
        parameters: All parameters, before and after.
        active_parameters: Those that one token passes through, before and after.
        weights_bytes: Bytes of all stored tensors, before and after.
        method: Every choice in force.
        calibration: What the experts were observed on.
        layers: The MoE layers.
        dropped_tensors: Reasons by the names of the source's tensors that were left out.
        warnings: What was warned about.
        timings_seconds: Seconds by stage.
        peak_memory_bytes: Peak of the process, and of every accelerator.
        versions: Python and the libraries.
        schema_version: Version of the format.
        pushed: Where the result is on the Hub; no part of ``hcsmoe.json``, which is there itself.
    """

    tool: dict[str, str]
    source: dict[str, Any]
    experts: dict[str, int]
    parameters: dict[str, int]
    active_parameters: dict[str, int]
    weights_bytes: dict[str, int]
    method: dict[str, Any]
    calibration: dict[str, Any]
    layers: list[LayerReport]
    dropped_tensors: dict[str, str]
    warnings: list[str]
    timings_seconds: dict[str, float]
    peak_memory_bytes: dict[str, int]
    versions: dict[str, str]
    schema_version: int = SCHEMA_VERSION
    pushed: Pushed | None = None

    def as_dict(self) -> dict[str, Any]:
        """The content of ``hcsmoe.json`` as JSON values, ``schema_version`` first."""
        content = asdict(replace(self, pushed=None))
        del content["pushed"]
        return {"schema_version": content.pop("schema_version"), **content}
