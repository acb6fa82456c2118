"""What a conversion may be asked to do: every choice is an enum member, every number has a unit."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

DEFAULT_SAMPLES = 32
DEFAULT_SEQUENCE_LENGTH = 2048
DEFAULT_MAX_SHARD_SIZE = "5GB"


class Similarity(StrEnum):
    """What two experts are compared by."""

    EXPERT_OUTPUT = "expert-output"


class Distance(StrEnum):
    """How far apart two feature vectors are."""

    EUCLIDEAN = "euclidean"
    COSINE = "cosine"


class Clustering(StrEnum):
    """How experts are grouped."""

    HIERARCHICAL = "hierarchical"


class Linkage(StrEnum):
    """How far apart two clusters are, given the distances of their members."""

    AVERAGE = "average"
    SINGLE = "single"
    COMPLETE = "complete"
    WARD = "ward"


class Merge(StrEnum):
    """How the members of a cluster are weighted when they become one expert."""

    FREQUENCY = "frequency"
    AVERAGE = "average"


class RouterPolicy(StrEnum):
    """How the N router rows become K."""

    DOMINANT = "dominant"
    FREQUENCY = "frequency"
    AVERAGE = "average"


class Layout(StrEnum):
    """How the merged experts are written down."""

    REDUCED = "reduced"


class Device(StrEnum):
    """Well-known values of ``--device``; ``cuda:1`` and the like are accepted as well."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodOptions:
    """Which experts meet, what they become, and how the router follows."""

    similarity: Similarity = Similarity.EXPERT_OUTPUT
    distance: Distance = Distance.EUCLIDEAN
    clustering: Clustering = Clustering.HIERARCHICAL
    linkage: Linkage = Linkage.AVERAGE
    merge: Merge = Merge.FREQUENCY
    router: RouterPolicy = RouterPolicy.DOMINANT
    layout: Layout = Layout.REDUCED


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationOptions:
    """Which text the experts are observed on.

    Attributes:
        dataset: ``bundled``, ``c4``, a local file, or a Hub dataset id.
        samples: Number of packed sequences.
        sequence_length: Tokens per sequence; ``None`` takes 2048 or the model's own limit if that is lower.
        seed: Seed of the document shuffle.
        text_column: Column that holds the text; ``None`` finds ``messages``, ``text`` or ``content``.
    """

    dataset: str = "bundled"
    samples: int = DEFAULT_SAMPLES
    sequence_length: int | None = None
    seed: int = 42
    text_column: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertOptions:
    """Everything ``hcsmoe convert`` can be told.

    Attributes:
        experts: Experts to keep in every MoE layer.
        experts_per_token: Experts that each token visits in the result; ``None`` keeps the source's number.
        output: Folder of the result; ``None`` is ``./NAME-hcsmoe-Ke``.
        max_shard_size: Upper size of one written shard, such as ``5GB``.
        overwrite: Replace a checkpoint that is already in the output folder.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.
        batch_tokens: Tokens per micro-batch while a layer runs, ``None`` for what suits the device; halves itself when
            memory runs out.
        max_memory_bytes: Refuse a plan whose estimated peak is above this many bytes.
    """

    experts: int
    experts_per_token: int | None = None
    method: MethodOptions = MethodOptions()
    calibration: CalibrationOptions = CalibrationOptions()
    output: Path | None = None
    max_shard_size: str = DEFAULT_MAX_SHARD_SIZE
    overwrite: bool = False
    device: str = Device.AUTO
    batch_tokens: int | None = None
    max_memory_bytes: int | None = None
