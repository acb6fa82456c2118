"""The words of a conversion: one enum per choice, whose values are what the command line and the reports say."""

from enum import StrEnum
from typing import Self


class Preset(StrEnum):
    """A method under the name that people know it by."""

    HC_REFIT = "hc-refit"
    HC_SMOE = "hc-smoe"
    M_SMOE = "m-smoe"
    REAP = "reap"


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
    """How far apart two clusters are: by the distances of their members, or by what their union would lose."""

    AVERAGE = "average"
    SINGLE = "single"
    COMPLETE = "complete"
    WARD = "ward"
    LOSS = "loss"


class KMeansStart(StrEnum):
    """Where the centres of k-means begin."""

    PLUS_PLUS = "k-means++"
    FIRST = "first"
    RANDOM = "random"


class Dominant(StrEnum):
    """Which expert of a cluster the others follow: its router row, its order of neurons, its place as a seed."""

    FREQUENCY = "frequency"
    ROUTING_SCORE = "routing-score"
    SALIENCY = "saliency"
    CENTER = "center"

    @classmethod
    def _missing_(cls, value: object) -> Self | None:
        # What reports and scripts of version 0.1 call it.
        return cls(cls.FREQUENCY) if value == "usage" else None


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
    NEURONS = "neurons"


class Features(StrEnum):
    """What neurons of different experts are matched by in fix-dom and ZipIt."""

    ACTIVATION = "activation"
    WEIGHT = "weight"
    ACTIVATION_WEIGHT = "activation+weight"


class Align(StrEnum):
    """What neurons are matched by when they are permuted before a weighted merge."""

    NONE = "none"
    WEIGHT = "weight"
    ACTIVATION = "activation"


class AlignTo(StrEnum):
    """Whose order of neurons the members of a cluster take: the layer's first expert's, or their dominant expert's."""

    FIRST = "first"
    DOMINANT = "dominant"


class Saliency(StrEnum):
    """Which experts pruning keeps."""

    FREQUENCY = "frequency"
    ROUTING_SCORE = "routing-score"
    REAP = "reap"
    MAN = "man"
    TOTAL_MASS = "total-mass"
    GRAM = "gram"
    OMP = "omp"
    RECONSTRUCTION = "reconstruction"


class Refit(StrEnum):
    """What is refitted to the original layer's output."""

    NONE = "none"
    DOWN = "down"
    BLOCK = "block"
    MODEL = "model"


class FormerRefit(StrEnum):
    """What earlier versions refitted; only their reports name it."""

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
    FACTORED = "factored"


class Dtype(StrEnum):
    """How the weights of a quantised source are written."""

    SOURCE = "source"
    BFLOAT16 = "bfloat16"


class Mtp(StrEnum):
    """What becomes of the heads that predict more than the next token."""

    KEEP = "keep"
    DROP = "drop"


class Device(StrEnum):
    """Well-known names of devices; ``cuda:1`` and the like are accepted as well."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"
