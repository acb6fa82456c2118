"""What a conversion does with its method: the text it looks at, where it runs, and where the result goes."""

from dataclasses import dataclass, field
from pathlib import Path

from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.options.checks import Count, DeviceName, Natural, ShardSize, Width, check_fields
from hcsmoe_hub.options.choices import Device, Dtype, Mtp
from hcsmoe_hub.options.memory_limits import MaxMemory
from hcsmoe_hub.options.method import MethodOptions
from hcsmoe_hub.options.target import Target

# The papers' 32 sequences of 2048 tokens; a model that takes shorter ones gets more of them.
DEFAULT_TOKENS = 32 * 2048
# A fit has far more numbers to find than a choice, and what it finds on little text holds for that text only.
FITTED_TOKENS = 2 * DEFAULT_TOKENS
DEFAULT_SEQUENCE_LENGTH = 2048
# T5 was pretrained on 512 tokens of input and 114 of targets.
DEFAULT_SIDED_LENGTH = 512 + 114
DEFAULT_MAX_SHARD_SIZE = "5GB"
DEFAULT_FEATURE_TOKENS = 2048


def default_length(max_positions: int | None, *, is_encoder_decoder: bool = False) -> int:
    """Tokens per sequence if the options name no number.

    Args:
        max_positions: Maximum sequence length of the model; ``None`` if its config does not state one.
        is_encoder_decoder: Whether a sequence is split between an encoder and a decoder.
    """
    usual = DEFAULT_SIDED_LENGTH if is_encoder_decoder else DEFAULT_SEQUENCE_LENGTH
    return min(usual, max_positions or usual)


def default_samples(sequence_length: int, *, fits: bool) -> int:
    """Number of sequences if the options name none: as many as hold 65,536 tokens, or twice that for a refit.

    Args:
        sequence_length: Tokens per sequence.
        fits: Whether a refit is fitted to them.
    """
    return max(1, (FITTED_TOKENS if fits else DEFAULT_TOKENS) // sequence_length)


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationOptions:
    """Which text the experts are observed on.

    Attributes:
        dataset: ``bundled``, ``c4``, ``self`` (text that the source model writes), the address of an OpenAI-compatible
            server, a local file or folder, or a dataset of the Hub as ``ID[:CONFIG][:SPLIT]``;
            several of them with commas between them, with relative shares: ``a.jsonl=0.5,b.jsonl=0.3,c4=0.2``.
        samples: Number of packed sequences; ``None`` takes as many as hold 65,536 tokens, or up to 131,072 for a
            refit.
        sequence_length: Tokens per sequence; ``None`` takes 2048, or 626 for an encoder-decoder model (source and
            target together), or the model's own limit if that is lower.
        source_length: Tokens of every sequence, the first ones, that go into the encoder of an encoder-decoder model.
            ``None`` takes the share that sources have of the tokens of the pairs, what T5's span corruption leaves of
            a text, or half of a sequence of token ids.
        seed: Seed of the document shuffle.
        text_column: Column that holds text or conversations, or ``SOURCE,TARGET`` for the columns of a pair; ``None``
            finds them by the usual names of columns.
        feature_tokens: Tokens of every layer that are kept for the features of neurons, for overlaps, for the
            reconstruction error and in a statistics file; a seeded sample of all calibration tokens.

    Raises:
        PlanError: If a value is not one that the option takes.
    """

    dataset: str = "bundled"
    samples: Count | None = None
    sequence_length: Count | None = None
    source_length: Count | None = None
    seed: Natural = 42
    text_column: str | None = None
    feature_tokens: Count = DEFAULT_FEATURE_TOKENS

    def __post_init__(self) -> None:
        # A file may be given as a path.
        if isinstance(self.dataset, Path):
            object.__setattr__(self, "dataset", str(self.dataset))
        check_fields(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class PushOptions:
    """Where a result goes on the Hub.

    Attributes:
        repo_id: ``namespace/name``.
        private: Create the repository as a private one; an existing one must already be private.
        create_pr: Propose the result as a pull request.
        overwrite: Replace a checkpoint that is already there.
        revision: Branch, created if it does not exist; ``None`` is ``main``.

    Raises:
        PlanError: If a value is not one that the option takes.
    """

    repo_id: str
    private: bool = False
    create_pr: bool = False
    overwrite: bool = False
    revision: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def branch(self) -> str:
        """The branch that the result goes to, or is proposed for."""
        return self.revision or "main"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertOptions:
    """Everything that a conversion can be asked for.

    Attributes:
        experts: Experts to keep in every MoE layer; ``None`` keeps all of them, or what ``target`` or ``like`` says.
        expert_width: Neurons to keep in every expert, or a share of them such as ``"75%"``; ``None`` keeps all of them,
            or what ``target`` or ``like`` says.
        target: What the result may weigh, in place of ``experts`` and ``expert_width``.
        experts_per_token: Active experts per token in the result; ``None`` keeps the source's number.
        method: How the experts are reduced; by default the preset ``hc-refit``.
        like: A result whose choices are applied to this model: which experts are kept or merged, and which neurons. A
            folder, the path of its ``hcsmoe.json``, or a Hub repository id.
        calibration: Which text the experts are observed on.
        dtype: How the weights of a quantised source are written: in the source's own format, where what nothing
            changes keeps its bytes, or all of them in bfloat16.
        mtp: Whether the result has the source's multi-token prediction head, its experts reduced as in every layer.
        output: Folder of the result; ``None`` is ``./NAME-hcsmoe-Ke``, with ``-Ww`` for experts of fewer neurons.
        max_shard_size: Maximum size of a written shard, such as ``5GB``.
        overwrite: Replace a checkpoint that is already in the output folder.
        checkpoint: Whether to keep what every layer leaves, so that the same call goes on where an interrupted
            conversion has come to; ``False`` saves its share of the disk.
        restart: Begin anew, giving up an interrupted conversion or recovery in the output folder.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.
        batch_tokens: Tokens per micro-batch while a layer runs, ``None`` for what suits the device; halved when memory
            runs out.
        max_memory: Memory that the conversion may need: bytes or a size such as ``"24GB"`` for the host, or by place,
            ``{"cpu": "24GB", "cuda:0": "40GB"}``; ``"cuda"`` is every accelerator, a number a certain one. Under a
            limit, a conversion is refused if its estimated peak is above it, and begins otherwise, even if less is
            free. Without one, it is refused if its peak is above what is free.
        statistics: File of calibration statistics: reused if it exists, written otherwise.
        keep_states: Whether a statistics file that is written holds the hidden states of all calibration tokens.
            Without them, a later conversion that fits or scores on single tokens runs the source again.
        measure: Whether to measure what the conversion cost: perplexity and agreement with the source on held-out text
            of the calibration set, which runs through the layers along with it.
        figure: Draw usage, distances and dendrogram of every layer into the result.
        push: Where the result goes on the Hub; shards are uploaded as they are finished.
        low_disk: Keep at most the downloaded shards of two layers on disk; of a result that is pushed, one shard.

    Raises:
        PlanError: If a value is not one that the option takes.
    """

    experts: Count | None = None
    expert_width: Width | None = None
    target: Target | None = None
    experts_per_token: Count | None = None
    method: MethodOptions = field(default_factory=MethodOptions)
    like: str | None = None
    calibration: CalibrationOptions = CalibrationOptions()
    dtype: Dtype = Dtype.SOURCE
    mtp: Mtp = Mtp.KEEP
    output: Path | None = None
    max_shard_size: ShardSize = DEFAULT_MAX_SHARD_SIZE
    overwrite: bool = False
    checkpoint: bool = True
    restart: bool = False
    device: DeviceName = Device.AUTO
    batch_tokens: Count | None = None
    max_memory: MaxMemory | None = None
    statistics: Path | None = None
    keep_states: bool = True
    measure: bool = True
    figure: bool = False
    push: PushOptions | None = None
    low_disk: bool = False

    def __post_init__(self) -> None:
        # A folder may be given as a path.
        if isinstance(self.like, Path):
            object.__setattr__(self, "like", str(self.like))
        check_fields(self)
        counted = self.experts is not None or self.expert_width is not None
        if self.like is not None:
            if self.target is not None:
                raise PlanError(
                    "`like` takes the number and width of experts from another result, but a target is given as well.",
                    hint="leave the target out, or `like`",
                )
        elif counted is (self.target is not None):
            raise PlanError(
                "`experts` and `expert_width` say what is left, a target (`size`, `parameters`, `active` or `ratio`) "
                f"what it may weigh, but {'both are' if counted else 'neither is'} given.",
                hint="give `experts`, `expert_width`, or both; or one target; or `like`",
            )
