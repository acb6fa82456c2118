"""What a conversion may be asked to do: every choice is an enum member, every number has a unit."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

# The papers' 32 sequences of 2048 tokens; a model that takes shorter ones gets more of them.
DEFAULT_TOKENS = 32 * 2048
# A fit has far more numbers to find than a choice, and what it finds on little text holds for that text only.
FITTED_TOKENS = 2 * DEFAULT_TOKENS
DEFAULT_SEQUENCE_LENGTH = 2048
DEFAULT_MAX_SHARD_SIZE = "5GB"
DEFAULT_FEATURE_TOKENS = 2048


def default_samples(sequence_length: int, *, fits: bool) -> int:
    """Number of sequences if none is asked for: as many as hold 65,536 tokens, or twice that for a fit.

    Args:
        sequence_length: Tokens per sequence.
        fits: Whether a refit is fitted to them.
    """
    return max(1, (FITTED_TOKENS if fits else DEFAULT_TOKENS) // sequence_length)


class Method(StrEnum):
    """How N experts become K."""

    MERGE = "merge"
    PRUNE = "prune"


class Similarity(StrEnum):
    """What two experts are compared by; several are joined with ``+``."""

    EXPERT_OUTPUT = "expert-output"
    WEIGHT = "weight"
    ROUTER_LOGITS = "router-logits"
    ROUTER_WEIGHT = "router-weight"


class Distance(StrEnum):
    """How far apart two experts are."""

    EUCLIDEAN = "euclidean"
    COSINE = "cosine"
    KL_DIVERGENCE = "kl-divergence"
    WASSERSTEIN = "wasserstein"


class Clustering(StrEnum):
    """How experts are grouped."""

    HIERARCHICAL = "hierarchical"
    KMEANS = "kmeans"
    FUZZY = "fuzzy"
    SINGLE_SHOT = "single-shot"
    RANDOM = "random"


class Linkage(StrEnum):
    """How far apart two clusters are, given the distances of their members."""

    AVERAGE = "average"
    SINGLE = "single"
    COMPLETE = "complete"
    WARD = "ward"


class KMeansStart(StrEnum):
    """Where the centres of k-means begin."""

    PLUS_PLUS = "k-means++"
    FIRST = "first"
    RANDOM = "random"


class Dominant(StrEnum):
    """Which expert of a cluster the others follow: its router row, its order of neurons, its place as a seed."""

    USAGE = "usage"
    ROUTING_SCORE = "routing-score"
    SALIENCY = "saliency"
    CENTER = "center"


class Budget(StrEnum):
    """How many clusters each layer gets, given the average over layers."""

    UNIFORM = "uniform"
    FREQUENCY = "frequency"
    M_SMOE = "m-smoe"


class Merge(StrEnum):
    """How the members of a cluster become one expert."""

    FREQUENCY = "frequency"
    AVERAGE = "average"
    SALIENCY = "saliency"
    DOMINANT = "dominant"
    MEMBERSHIP = "membership"
    FIX_DOM = "fix-dom"
    FIX_DOM_ONE_TO_ONE = "fix-dom-one-to-one"
    ZIPIT = "zipit"


class Features(StrEnum):
    """What neurons of different experts are matched by in fix-dom and ZipIt."""

    ACTIVATION = "activation"
    WEIGHT = "weight"
    ACTIVATION_WEIGHT = "activation+weight"


class Align(StrEnum):
    """How neurons are permuted towards the dominant expert before a weighted merge."""

    NONE = "none"
    WEIGHT = "weight"
    ACTIVATION = "activation"


class Saliency(StrEnum):
    """Which experts pruning keeps."""

    FREQUENCY = "frequency"
    ROUTING_SCORE = "routing-score"
    REAP = "reap"
    RECONSTRUCTION = "reconstruction"


class Refit(StrEnum):
    """What is fitted to the original layer's output after the merge."""

    NONE = "none"
    DOWN = "down"
    EXPERTS = "experts"
    BLOCKS = "blocks"


class Propagate(StrEnum):
    """On whose hidden states a layer is fitted."""

    ORIGINAL = "original"
    MERGED = "merged"


class RouterPolicy(StrEnum):
    """How the N router rows become K."""

    DOMINANT = "dominant"
    FREQUENCY = "frequency"
    AVERAGE = "average"
    MEMBERSHIP = "membership"
    FIT = "fit"


class Layout(StrEnum):
    """How the merged experts are written down."""

    REDUCED = "reduced"
    MAPPED = "mapped"
    FULL = "full"


class Device(StrEnum):
    """Well-known values of ``--device``; ``cuda:1`` and the like are accepted as well."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodOptions:
    """Which experts meet, what they become, and how the router follows.

    ``None`` takes what suits the other choices; a value that would have no effect is refused, see ``recipe.resolve``.

    Attributes:
        method: Merge clusters, or prune experts.
        similarity: What experts are compared by; the distances of several are normalised and added.
        distance: How far apart two experts are.
        clustering: How experts are grouped.
        linkage: Of hierarchical clustering.
        kmeans_start: Where k-means begins.
        dominant: Which expert of a cluster the others follow.
        budget: How many clusters each layer gets.
        max_cluster_size: Most experts of one cluster.
        protect: ``(layer, expert)`` pairs that are never merged; a layer of ``None`` stands for all.
        layers: Decoder layers to convert; the others keep all their experts.
        merge: How the members of a cluster become one expert.
        dominant_weights: Weight of the dominant expert and of every other one, for the merge of that name.
        features: What fix-dom and ZipIt match neurons by.
        align: How neurons are permuted before a weighted merge.
        saliency: Which experts pruning keeps.
        refit: What is fitted to the original layer's output in the ``reduced`` layout.
        router: How the router follows in the ``reduced`` layout.
        propagate: On whose hidden states a router is fitted and a layer is refitted.
        layout: How the result is written down.
        seed: Seed of every random choice.
    """

    method: Method = Method.MERGE
    similarity: tuple[Similarity, ...] | None = None
    distance: Distance | None = None
    clustering: Clustering | None = None
    linkage: Linkage | None = None
    kmeans_start: KMeansStart | None = None
    dominant: Dominant | None = None
    budget: Budget = Budget.UNIFORM
    max_cluster_size: int | None = None
    protect: tuple[tuple[int | None, int], ...] = ()
    layers: tuple[int, ...] | None = None
    merge: Merge | None = None
    dominant_weights: tuple[float, float] | None = None
    features: Features | None = None
    align: Align | None = None
    saliency: Saliency | None = None
    refit: Refit | None = None
    router: RouterPolicy | None = None
    propagate: Propagate | None = None
    layout: Layout = Layout.REDUCED
    seed: int = 42


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationOptions:
    """Which text the experts are observed on.

    Attributes:
        dataset: ``bundled``, ``c4``, a local file, or a Hub dataset id.
        samples: Number of packed sequences; ``None`` takes as many as hold 65,536 tokens, or up to 131,072 for a
            refit.
        sequence_length: Tokens per sequence; ``None`` takes 2048 or the model's own limit if that is lower.
        seed: Seed of the document shuffle.
        text_column: Column that holds the text; ``None`` finds ``messages``, ``text`` or ``content``.
        feature_tokens: Tokens of every layer that are kept for the features of neurons, for overlaps, for the
            reconstruction error and in a statistics file; a seeded sample of all calibration tokens.
    """

    dataset: str = "bundled"
    samples: int | None = None
    sequence_length: int | None = None
    seed: int = 42
    text_column: str | None = None
    feature_tokens: int = DEFAULT_FEATURE_TOKENS


@dataclass(frozen=True, slots=True, kw_only=True)
class PushOptions:
    """Where a result goes.

    Attributes:
        repo_id: ``namespace/name``.
        private: Make the repository a private one; one that is there must be private already.
        create_pr: Propose the result as a pull request.
        overwrite: Replace a checkpoint that is already there.
        revision: Branch, made if it is not there; ``None`` is ``main``.
    """

    repo_id: str
    private: bool = False
    create_pr: bool = False
    overwrite: bool = False
    revision: str | None = None

    @property
    def branch(self) -> str:
        """The branch that the result goes to, or is proposed for."""
        return self.revision or "main"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertOptions:
    """Everything ``hcsmoe convert`` can be told.

    Attributes:
        experts: Experts to keep in every MoE layer.
        experts_per_token: Experts that each token visits in the result; ``None`` keeps the source's number.
        method: How; ``None`` is the default preset, see ``presets``.
        output: Folder of the result; ``None`` is ``./NAME-hcsmoe-Ke``.
        max_shard_size: Upper size of one written shard, such as ``5GB``.
        overwrite: Replace a checkpoint that is already in the output folder.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.
        batch_tokens: Tokens per micro-batch while a layer runs, ``None`` for what suits the device; halves itself when
            memory runs out.
        max_memory_bytes: Refuse a plan whose estimated peak is above this many bytes.
        statistics: File of calibration statistics: reused if it exists, written otherwise.
        figure: Draw usage, distances and dendrogram of every layer into the result.
        push: Where the result goes on the Hub; shards are sent as they are finished.
        low_disk: Keep at most the downloaded shards of two layers on disk; of a result that is pushed, one shard.
    """

    experts: int
    experts_per_token: int | None = None
    method: MethodOptions | None = None
    calibration: CalibrationOptions = CalibrationOptions()
    output: Path | None = None
    max_shard_size: str = DEFAULT_MAX_SHARD_SIZE
    overwrite: bool = False
    device: str = Device.AUTO
    batch_tokens: int | None = None
    max_memory_bytes: int | None = None
    statistics: Path | None = None
    figure: bool = False
    push: PushOptions | None = None
    low_disk: bool = False
