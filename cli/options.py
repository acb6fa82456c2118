"""The options that commands share, and those of ``hcsmoe convert`` other than the method's; each declared once."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from hcsmoe_hub.cli.help_page import one_of
from hcsmoe_hub.cli.values import choice, parse_device, parse_limit, parse_shard_size
from hcsmoe_hub.options import DEFAULT_MAX_SHARD_SIZE, CalibrationOptions, Device, Dtype, Mtp, PushOptions

# Every device that has a name, and the form of the others.
DEVICES = one_of((*Device, "cuda:N"))

_CALIBRATION = CalibrationOptions()
_calibration = partial(typer.Option, rich_help_panel="Calibration")
_compute = partial(typer.Option, rich_help_panel="Compute")
_output = partial(typer.Option, rich_help_panel="Output")
_hub = partial(typer.Option, rich_help_panel="Hub")
# A flag takes no value, so its help names no type.
_output_flag = partial(_output, metavar="")
_hub_flag = partial(_hub, metavar="")

SourceArgument = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE", show_default=False, help="Hub repository id, hf://NAMESPACE/NAME@REVISION, or a local folder."
    ),
]
PathArgument = Annotated[
    Path, typer.Argument(metavar="PATH", show_default=False, help="Folder that hcsmoe convert has written.")
]

PrivateOption = Annotated[
    bool,
    _hub_flag("--private", help="Create the repository as private (an existing one must already be private)."),
]
CreatePrOption = Annotated[bool, _hub_flag("--create-pr", help="Propose the result as a pull request.")]
JsonOption = Annotated[bool, _output_flag("--json", help="Print one JSON document.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFlags:
    """Which text the experts are observed on."""

    calibration: Annotated[
        str,
        _calibration(
            "--calibration",
            metavar="NAME",
            help="Text to observe the experts on: bundled, c4, self (written by the model), a server (http://HOST/v1), "
            "a file (.jsonl, .json, .txt, .parquet, .csv, .npy), a folder, a Hub dataset as ID[:CONFIG][:SPLIT], "
            "or several with shares (a.jsonl=0.7,c4=0.3).",
        ),
    ] = _CALIBRATION.dataset
    samples: Annotated[
        int | None,
        _calibration(
            "--samples",
            min=1,
            metavar="N",
            show_default="65536 tokens, or 131072 for a refit",
            help="Sequences of calibration text.",
        ),
    ] = _CALIBRATION.samples
    sequence_length: Annotated[
        int | None,
        _calibration(
            "--sequence-length",
            min=1,
            metavar="N",
            show_default="2048, or 626 with an encoder",
            help="Tokens per sequence, at most as many as the model takes.",
        ),
    ] = _CALIBRATION.sequence_length
    source_length: Annotated[
        int | None,
        _calibration(
            "--source-length",
            min=1,
            metavar="N",
            show_default="by the text",
            help="Tokens of a sequence that go into an encoder.",
        ),
    ] = _CALIBRATION.source_length
    seed: Annotated[
        int,
        _calibration("--seed", min=0, metavar="N", help="Seed of every random choice."),
    ] = _CALIBRATION.seed
    text_column: Annotated[
        str | None,
        _calibration(
            "--text-column",
            metavar="NAME",
            show_default="found by name",
            help="Column of text or conversations; SOURCE,TARGET for pairs.",
        ),
    ] = _CALIBRATION.text_column
    feature_tokens: Annotated[
        int,
        _calibration(
            "--feature-tokens",
            min=1,
            metavar="N",
            help="Tokens per layer kept for methods that compare single tokens.",
        ),
    ] = _CALIBRATION.feature_tokens
    statistics: Annotated[
        Path | None,
        _calibration(
            "--statistics",
            metavar="FILE",
            show_default=False,
            help="Save calibration statistics here, or reuse them without running the source.",
        ),
    ] = None
    no_states: Annotated[
        bool,
        _calibration(
            "--no-states",
            metavar="",
            help="Leave hidden states out of that file; a later refit then runs the source.",
        ),
    ] = False

    def options(self) -> CalibrationOptions:
        """The library's options."""
        return CalibrationOptions(
            dataset=self.calibration,
            samples=self.samples,
            sequence_length=self.sequence_length,
            source_length=self.source_length,
            seed=self.seed,
            text_column=self.text_column,
            feature_tokens=self.feature_tokens,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationFlags(TextFlags):
    """Which text the experts are observed on, and whether the result is measured on more of it."""

    no_measure: Annotated[
        bool,
        _calibration(
            "--no-measure",
            metavar="",
            help="Do not measure perplexity and agreement with the source on held-out text of the calibration set.",
        ),
    ] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeFlags:
    """Where the layers run, and within which limits."""

    device: Annotated[
        str,
        _compute("--device", parser=parse_device, metavar="NAME", help=f"Where the layers run: {DEVICES}."),
    ] = Device.AUTO
    batch_tokens: Annotated[
        int | None,
        _compute(
            "--batch-tokens",
            min=1,
            metavar="N",
            show_default="chosen for the device",
            help="Tokens per micro-batch; halved when memory runs out.",
        ),
    ] = None
    max_memory: Annotated[
        list[dict[str, int]] | None,
        _compute(
            "--max-memory",
            parser=parse_limit,
            metavar="[DEVICE=]SIZE",
            show_default="what is free",
            help="Most memory it may need, e.g. 24GB or cuda:0=40GB (repeatable): not started above it, but below it "
            "even if less is free.",
        ),
    ] = None

    def limits(self) -> dict[str, int] | None:
        """Limits on memory by place, as the library's options have them."""
        return {place: size for limit in self.max_memory for place, size in limit.items()} if self.max_memory else None


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputFlags:
    """What is written, and what is printed about it."""

    output: Annotated[
        Path | None,
        _output("--output", "-o", metavar="DIR", show_default="./NAME-hcsmoe-Ke", help="Folder of the result."),
    ] = None
    dtype: Annotated[
        Dtype,
        _output(
            "--dtype",
            parser=choice(Dtype),
            metavar="NAME",
            help=f"Format of the weights that the source has quantised: {one_of(Dtype)}.",
        ),
    ] = Dtype.SOURCE
    max_shard_size: Annotated[
        str,
        _output("--max-shard-size", parser=parse_shard_size, metavar="SIZE", help="Maximum size of a shard."),
    ] = DEFAULT_MAX_SHARD_SIZE
    mtp: Annotated[
        Mtp,
        _output(
            "--mtp",
            parser=choice(Mtp),
            metavar="NAME",
            help=f"What becomes of a multi-token prediction head: {one_of(Mtp)}.",
        ),
    ] = Mtp.KEEP
    figure: Annotated[
        bool,
        _output_flag(
            "--figure",
            help="Also draw usage, distances and clusters (hcsmoe[plots]).",
        ),
    ] = False
    overwrite: Annotated[bool, _output_flag("--overwrite", help="Replace an existing checkpoint.")] = False
    restart: Annotated[
        bool,
        _output_flag("--restart", help="Begin anew, giving up an interrupted conversion or recovery."),
    ] = False
    no_checkpoint: Annotated[
        bool, _output_flag("--no-checkpoint", help="Keep nothing to go on from after an interruption.")
    ] = False
    dry_run: Annotated[bool, _output_flag("--dry-run", help="Show the plan and what it needs; reads headers only.")] = (
        False
    )
    as_json: JsonOption = False
    quiet: Annotated[bool, _output_flag("--quiet", "-q", help="Print only the path of the result.")] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PushFlags:
    """Where a result goes on the Hub while it is written, and what stays on this machine."""

    push_to: Annotated[
        str | None,
        _hub(
            "--push-to",
            metavar="REPO_ID",
            show_default=False,
            help="Push the result to this repository while it is written.",
        ),
    ] = None
    private: PrivateOption = False
    create_pr: CreatePrOption = False
    low_disk: Annotated[
        bool,
        _hub_flag(
            "--low-disk",
            help="Delete downloaded shards that have been read and, with --push-to, new ones that have been sent.",
        ),
    ] = False

    def options(self, *, overwrite: bool) -> PushOptions | None:
        """The library's options; ``None`` if nothing is pushed.

        Raises:
            typer.BadParameter: If an option of a push is given without a push.
        """
        if self.push_to is None:
            for flag, is_given in (("--private", self.private), ("--create-pr", self.create_pr)):
                if is_given:
                    raise typer.BadParameter("has no effect without --push-to.", param_hint=flag)
            return None
        return PushOptions(repo_id=self.push_to, private=self.private, create_pr=self.create_pr, overwrite=overwrite)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hub:
    """How a repository of the Hub is reached."""

    revision: Annotated[
        str | None, _hub("--revision", metavar="REVISION", show_default="main", help="Branch, tag or commit to read.")
    ] = None
    token: Annotated[
        str | None,
        _hub("--token", metavar="TOKEN", envvar="HF_TOKEN", show_default="the stored login", help="Hub access token."),
    ] = field(default=None, repr=False)
    cache_dir: Annotated[
        Path | None,
        _hub("--cache-dir", metavar="DIR", show_default="the Hub cache", help="Folder for downloads."),
    ] = None

    def arguments(self) -> dict[str, Any]:
        """As keyword arguments of the library's functions that open a source."""
        return {"revision": self.revision, "token": self.token, "cache_dir": self.cache_dir}
