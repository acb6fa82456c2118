"""What a conversion did: the content of ``hcsmoe.json``, and nothing that was not measured."""

from dataclasses import asdict, dataclass
from typing import Any

SCHEMA_VERSION = 1
REPORT_FILE = "hcsmoe.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterReport:
    """How the router of one layer followed.

    Attributes:
        policy: The rule that made K rows from N.
        top_k_agreement: Share of the clusters chosen by the full router that the reduced one chooses too, 0 to 1.
    """

    policy: str
    top_k_agreement: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReport:
    """One MoE layer.

    Attributes:
        layer: Index of the decoder layer.
        labels: Cluster of every source expert, numbered by first appearance.
        dominant: Most used source expert of every cluster.
        usage: How often the router chose each source expert on the calibration tokens.
        saliency: Mean of router weight times output norm over the tokens routed to each source expert.
        merge_heights: Linkage distance of every merge.
        router: How the router followed.
        output_error: Relative error of the new block's routed output against the old one on the calibration tokens;
            shared experts, which do not change, are left out.
    """

    layer: int
    labels: list[int]
    dominant: list[int]
    usage: list[int]
    saliency: list[float]
    merge_heights: list[float]
    router: RouterReport
    output_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionReport:
    """Everything about a conversion that its result should remember."""

    tool: dict[str, str]
    source: dict[str, Any]
    experts: dict[str, int]
    parameters: dict[str, int]
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

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON values, ``schema_version`` first."""
        content = asdict(self)
        return {"schema_version": content.pop("schema_version"), **content}
