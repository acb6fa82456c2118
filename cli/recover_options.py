"""The options of ``hcsmoe recover``, each declared once."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from hcsmoe_hub.cli.help_page import one_of
from hcsmoe_hub.cli.options import DEVICES, JsonOption
from hcsmoe_hub.cli.values import choice, choices, parse_device, parse_positive, parse_share, parse_weight
from hcsmoe_hub.options import DEFAULT_SIDED_LENGTH, Device
from hcsmoe_hub.recovery.options import (
    DEFAULT_LENGTH,
    DEFAULT_LORA_RATE,
    DEFAULT_PASSES,
    DEFAULT_RANK,
    DEFAULT_RATE,
    DEFAULT_TOKENS,
    Precision,
    RecoverOptions,
    Train,
)

# What a recovery has if nothing else is asked for.
DEFAULTS = RecoverOptions(teacher="", data="")

_text = partial(typer.Option, rich_help_panel="Text")
_training = partial(typer.Option, rich_help_panel="Training")
_end = partial(typer.Option, rich_help_panel="Length and early stop")
_compute = partial(typer.Option, rich_help_panel="Compute")
_output = partial(typer.Option, rich_help_panel="Output")
_output_flag = partial(_output, metavar="")

ResultArgument = Annotated[
    str,
    typer.Argument(
        metavar="RESULT", show_default=False, help="Folder or Hub repository that hcsmoe convert has written."
    ),
]
TeacherOption = Annotated[
    str,
    _training(
        "--teacher",
        metavar="SOURCE",
        show_default=False,
        help="Model to learn from; as a rule, the one that RESULT was made from.",
    ),
]
DataOption = Annotated[
    str,
    _text(
        "--data",
        metavar="NAME",
        show_default=False,
        help="Text or pairs to train on: a file (.jsonl, .json, .txt, .parquet, .csv, .npy), a folder, a Hub dataset "
        "as ID[:CONFIG][:SPLIT], bundled, c4, or several with shares (a.jsonl=0.7,c4=0.3).",
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryTextFlags:
    """How much text is read, and how it is cut."""

    samples: Annotated[
        int | None,
        _text(
            "--samples",
            min=1,
            metavar="N",
            show_default=f"what --max-steps need, or {DEFAULT_TOKENS} tokens",
            help="Sequences to read at most.",
        ),
    ] = DEFAULTS.samples
    sequence_length: Annotated[
        int | None,
        _text(
            "--sequence-length",
            min=1,
            metavar="N",
            show_default=f"{DEFAULT_LENGTH}, or {DEFAULT_SIDED_LENGTH} with an encoder",
            help="Tokens per sequence, at most as many as the model takes.",
        ),
    ] = DEFAULTS.sequence_length
    source_length: Annotated[
        int | None,
        _text(
            "--source-length",
            min=1,
            metavar="N",
            show_default="by the text",
            help="Tokens of a sequence that go into an encoder.",
        ),
    ] = DEFAULTS.source_length
    text_column: Annotated[
        str | None,
        _text(
            "--text-column",
            metavar="NAME",
            show_default="found by name",
            help="Column of text or conversations; SOURCE,TARGET for pairs.",
        ),
    ] = DEFAULTS.text_column
    held_out: Annotated[
        float,
        _text(
            "--held-out",
            parser=parse_share,
            metavar="SHARE",
            help="Share of the text, in whole documents, that is not trained on but chooses the best state.",
        ),
    ] = DEFAULTS.held_out


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingFlags:
    """What is trained, and towards what."""

    train: Annotated[
        tuple[Train, ...] | None,
        _training(
            "--train",
            parser=choices(Train),
            metavar="NAMES",
            show_default="+".join(DEFAULTS.train),
            help=f"What is trained, joined with +; lora stands alone, and covers all matrices: {one_of(Train)}.",
        ),
    ] = None
    lora_rank: Annotated[
        int | None,
        _training(
            "--lora-rank", min=1, metavar="N", show_default=f"{DEFAULT_RANK}", help="Rank of the factors of LoRA."
        ),
    ] = DEFAULTS.lora_rank
    temperature: Annotated[
        float,
        _training(
            "--temperature",
            parser=parse_positive,
            metavar="X",
            help="What the logits of both models are divided by before they are compared.",
        ),
    ] = DEFAULTS.temperature
    kd_weight: Annotated[
        float,
        _training(
            "--kd-weight", parser=parse_weight, metavar="X", help="Weight of the divergence from the teacher's logits."
        ),
    ] = DEFAULTS.kd_weight
    text_weight: Annotated[
        float,
        _training(
            "--text-weight",
            parser=parse_weight,
            metavar="X",
            show_default="0",
            help="Weight of the loss on the text itself.",
        ),
    ] = DEFAULTS.text_weight
    learning_rate: Annotated[
        float | None,
        _training(
            "--learning-rate",
            parser=parse_positive,
            metavar="X",
            show_default=f"{DEFAULT_RATE}; {DEFAULT_LORA_RATE} for LoRA",
            help="Largest step: a share of each tensor's root mean square, or a number with LoRA.",
        ),
    ] = DEFAULTS.learning_rate
    batch_size: Annotated[
        int, _training("--batch-size", min=1, metavar="N", help="Sequences at once on each process.")
    ] = DEFAULTS.batch_size
    gradient_accumulation: Annotated[
        int,
        _training(
            "--gradient-accumulation", min=1, metavar="N", help="Batches whose gradients are added up for one step."
        ),
    ] = DEFAULTS.gradient_accumulation
    seed: Annotated[int, _training("--seed", min=0, metavar="N", help="Seed of every random choice.")] = DEFAULTS.seed


@dataclass(frozen=True, slots=True, kw_only=True)
class EndFlags:
    """How long the training takes, and when it ends early."""

    max_steps: Annotated[
        int | None,
        _end(
            "--max-steps",
            min=1,
            metavar="N",
            show_default=f"{DEFAULT_PASSES} passes over the text, or what fits --max-minutes",
            help="Steps to make at most.",
        ),
    ] = DEFAULTS.max_steps
    max_minutes: Annotated[
        float | None,
        _end(
            "--max-minutes",
            parser=parse_positive,
            metavar="X",
            show_default="no limit",
            help="Minutes to train for at most, those of interrupted runs included.",
        ),
    ] = DEFAULTS.max_minutes
    evaluate_every: Annotated[
        int,
        _end(
            "--evaluate-every",
            min=1,
            metavar="N",
            help="Steps between scores on held-out text, each of which also saves the state.",
        ),
    ] = DEFAULTS.evaluate_every
    patience: Annotated[
        int,
        _end(
            "--patience",
            min=0,
            metavar="N",
            help="Scores without an improvement after which the training ends; 0 never ends it early.",
        ),
    ] = DEFAULTS.patience or 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryComputeFlags:
    """Where both models run, and what saves memory."""

    device: Annotated[
        str,
        _compute("--device", parser=parse_device, metavar="NAME", help=f"Where the models run: {DEVICES}."),
    ] = Device.AUTO
    dtype: Annotated[
        Precision,
        _compute(
            "--dtype",
            parser=choice(Precision),
            metavar="NAME",
            help="What both models compute in; trained tensors are in float32, and written as RESULT stores them: "
            f"{one_of(Precision)}.",
        ),
    ] = DEFAULTS.dtype
    gradient_checkpointing: Annotated[
        bool,
        _compute(
            "--gradient-checkpointing", metavar="", help="Compute layers twice instead of keeping what they computed."
        ),
    ] = DEFAULTS.gradient_checkpointing
    teacher_logits: Annotated[
        Path | None,
        _compute(
            "--teacher-logits",
            metavar="DIR",
            show_default=False,
            help="Folder of the teacher's logits: it runs over all text first, and is not in memory during the "
            "training; logits that are there are reused.",
        ),
    ] = DEFAULTS.teacher_logits
    top_logits: Annotated[
        int,
        _compute(
            "--top-logits",
            min=1,
            metavar="N",
            help="Largest logits per token to keep there; the others count as one class.",
        ),
    ] = DEFAULTS.top_logits


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryOutputFlags:
    """What is written, and what is printed about it."""

    output: Annotated[
        Path | None,
        _output("--output", "-o", metavar="DIR", show_default="RESULT-recovered", help="Folder of the trained result."),
    ] = DEFAULTS.output
    overwrite: Annotated[
        bool, _output_flag("--overwrite", help="Replace an existing checkpoint, which may be RESULT itself.")
    ] = DEFAULTS.overwrite
    restart: Annotated[
        bool,
        _output_flag("--restart", help="Begin anew, giving up an interrupted conversion or recovery."),
    ] = DEFAULTS.restart
    dry_run: Annotated[
        bool,
        _output_flag("--dry-run", help="Show what would be trained, with memory and disk space; reads headers only."),
    ] = False
    as_json: JsonOption = False
    quiet: Annotated[bool, _output_flag("--quiet", "-q", help="Print only the path of the result.")] = False
