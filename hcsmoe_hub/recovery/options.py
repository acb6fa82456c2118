"""What a recovery may be asked for."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.options import Device
from hcsmoe_hub.options.checks import Count, DeviceName, Natural, Positive, Share, Weight, check_fields

# Largest step of a trained tensor as a share of its root mean square, and of the factors of LoRA as a number.
DEFAULT_RATE, DEFAULT_LORA_RATE = 0.005, 0.002
DEFAULT_RANK = 16
DEFAULT_TOP = 128
DEFAULT_LENGTH = 512
# Tokens that are read if neither steps nor sequences are given.
DEFAULT_TOKENS = 1 << 21
LEAST_TOKENS = 1 << 18
# Passes over the text if neither steps nor a time are given.
DEFAULT_PASSES = 2


class Train(StrEnum):
    """What is trained; several are joined with ``+``."""

    ROUTER = "router"
    EXPERTS = "experts"
    NORMS = "norms"
    LORA = "lora"


class Precision(StrEnum):
    """What a recovery computes in; trained tensors are held in float32 in any case."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoverOptions:
    """What a result is trained on, for how long, and where it goes.

    A step follows the gradient of ``kd_weight`` times the KL divergence of the result from its teacher, both at a
    ``temperature`` and times its square (Hinton et al., arXiv 1503.02531), plus ``text_weight`` times the loss on the
    text itself. MC-SMoE (arXiv 2310.01334) uses 0.2 and 1 at a temperature of 2, with frozen routers:
    ``kd_weight=0.2, text_weight=1, train="experts+norms"``.

    Attributes:
        teacher: The model that the result was made from, or another one with the same vocabulary: folder or Hub
            repository.
        data: Text, or pairs of source and target for a model with an encoder: a local file or folder, a dataset of the
            Hub, or anything else that calibration text may be, but for ``self``.
        output: Folder to write; ``None`` for that of the result with ``-recovered`` at its end.
        train: What is trained: any of ``router``, ``experts`` and ``norms``, or ``lora``: factors of a low rank on
            every matrix of the layers, those of routers, experts and attention included, which are added to
            the matrices in the end.
        lora_rank: Rank of these factors; ``None`` for 16. Only with ``lora``.
        temperature: What the logits of both models are divided by.
        kd_weight: Weight of the divergence from the teacher.
        text_weight: Weight of the loss on the text.
        learning_rate: Largest step of a trained tensor, as a share of its root mean square, or of the factors of LoRA,
            as a number; ``None`` for 0.005, or 0.002 with LoRA. It rises for a twentieth of the training, and then
            falls to nearly 0.
        batch_size: Sequences of one step on each process.
        gradient_accumulation: Batches whose gradients are added up for one step.
        gradient_checkpointing: Compute layers twice instead of keeping what they computed: slower, with less memory.
        sequence_length: Tokens per sequence; ``None`` takes 512, or 626 for a model with an encoder, or the model's own
            limit if that is lower.
        source_length: Tokens of every sequence, the first ones, that go into the encoder of an encoder-decoder model;
            ``None`` takes the share that sources have in the pairs, or half of token ids.
        samples: Most sequences to read; ``None`` for as many as ``max_steps`` need, but at least
            262,144 tokens, or as hold 2,097,152 tokens.
        text_column: Column that holds text or conversations, or both columns of pairs; ``None`` finds them by the usual
            names of columns.
        max_steps: Steps to make; ``None`` for two passes over the text, or as many as fit ``max_minutes``.
        max_minutes: Minutes to train for, those of interrupted runs included; ``None`` for no limit.
        evaluate_every: Steps after which held-out text is scored, and the state of the training is saved.
        patience: Scores without an improvement that end the training; ``None`` for no end before its time.
        held_out: Share of the text that is not trained on; whole documents, by which the best state is chosen.
        seed: Seed of the order of the text, and of LoRA's first factors.
        dtype: What both models compute in; ``auto`` is bfloat16 where the device has instructions for it. Trained
            tensors are held in float32, and written in the dtype that the result stores.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.
        teacher_logits: Folder that keeps the teacher's logits: it runs over all text first, layer by layer, and is not
            in memory while the result is trained. Logits in the folder are used if they are those of the same teacher
            on the same text.
        top_logits: Logits per token that are kept there: the largest ones, and what the others add up to.
        overwrite: Replace an older checkpoint in the output folder, which may be the result itself.
        restart: Begin anew, giving up an interrupted conversion or recovery in the output folder.

    Raises:
        PlanError: If a value is not one that the option takes.
    """

    teacher: str | Path
    data: str
    output: Path | None = None
    train: tuple[Train, ...] = (Train.ROUTER, Train.EXPERTS, Train.NORMS)
    lora_rank: Count | None = None
    temperature: Positive = 2.0
    kd_weight: Weight = 1.0
    text_weight: Weight = 0.0
    learning_rate: Positive | None = None
    batch_size: Count = 4
    gradient_accumulation: Count = 1
    gradient_checkpointing: bool = False
    sequence_length: Count | None = None
    source_length: Count | None = None
    samples: Count | None = None
    text_column: str | None = None
    max_steps: Count | None = None
    max_minutes: Positive | None = None
    evaluate_every: Count = 50
    patience: Count | None = 5
    held_out: Share = 0.05
    seed: Natural = 42
    dtype: Precision = Precision.AUTO
    device: DeviceName = Device.AUTO
    teacher_logits: Path | None = None
    top_logits: Count = DEFAULT_TOP
    overwrite: bool = False
    restart: bool = False

    def __post_init__(self) -> None:
        # A file may be given as a path.
        if isinstance(self.data, Path):
            object.__setattr__(self, "data", str(self.data))
        check_fields(self)
        object.__setattr__(self, "train", tuple(part for part in Train if part in self.train))
        self._check()

    def _check(self) -> None:
        if not self.train:
            raise PlanError("`train` names nothing to train.", hint="use `train='router+experts+norms'`")
        if self.is_lora and len(self.train) > 1:
            raise PlanError(
                f"`train='{'+'.join(self.train)}'` does not work: LoRA is on all matrices already.",
                hint="use `train='lora'` alone, or leave it out",
            )
        if self.lora_rank is not None and not self.is_lora:
            raise PlanError(
                f"`lora_rank={self.lora_rank}` needs LoRA.", hint="add `train='lora'`, or leave `lora_rank` out"
            )
        if not self.kd_weight and not self.text_weight:
            raise PlanError(
                "`kd_weight` and `text_weight` are both 0, so there is nothing to learn.",
                hint="use `kd_weight=1`",
            )

    @property
    def is_lora(self) -> bool:
        """Whether low-rank factors are trained instead of tensors."""
        return Train.LORA in self.train

    @property
    def rate(self) -> float:
        """Largest step."""
        return self.learning_rate or (DEFAULT_LORA_RATE if self.is_lora else DEFAULT_RATE)

    @property
    def rank(self) -> int | None:
        """Rank of LoRA's factors; ``None`` without LoRA."""
        return (self.lora_rank or DEFAULT_RANK) if self.is_lora else None
