"""The options of all commands, each declared once."""

from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from hcsmoe_hub.cli.values import choice, parse_device, parse_shard_size, parse_size
from hcsmoe_hub.options import Clustering, Device, Distance, Layout, Linkage, Merge, RouterPolicy, Similarity

_method = partial(typer.Option, rich_help_panel="Method")
_calibration = partial(typer.Option, rich_help_panel="Calibration")
_compute = partial(typer.Option, rich_help_panel="Compute")
_output = partial(typer.Option, rich_help_panel="Output")
_hub = partial(typer.Option, rich_help_panel="Hub")
# A flag takes no value, so its help names no type.
_output_flag = partial(_output, metavar="")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hub:
    """How a repository of the Hub is reached."""

    revision: str | None
    token: str | None = field(repr=False)
    cache_dir: Path | None

    def arguments(self) -> dict[str, Any]:
        """As keyword arguments of the library's functions that open a source."""
        return {"revision": self.revision, "token": self.token, "cache_dir": self.cache_dir}


def _choice(flag: str, kind: type[StrEnum], text: str) -> Any:
    return _method(flag, parser=choice(kind), metavar=f"[{'|'.join(kind)}]", help=text)


SourceArgument = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE", show_default=False, help="Repository id, hf://org/name@revision, or a local folder."
    ),
]
PathArgument = Annotated[
    Path, typer.Argument(metavar="PATH", show_default=False, help="Folder of a checkpoint, such as convert writes.")
]

ExpertsOption = Annotated[
    int,
    _method(
        "--experts", "-e", min=1, metavar="INT", show_default=False, help="Experts to keep in every MoE layer, e.g. 4."
    ),
]
ExpertsPerTokenOption = Annotated[
    int | None,
    _method(
        "--experts-per-token",
        min=1,
        metavar="INT",
        show_default="as in the source",
        help="Experts that each token visits, e.g. 2.",
    ),
]
SimilarityOption = Annotated[Similarity, _choice("--similarity", Similarity, "What two experts are compared by.")]
DistanceOption = Annotated[Distance, _choice("--distance", Distance, "How far apart two experts are.")]
ClusteringOption = Annotated[Clustering, _choice("--clustering", Clustering, "How experts are grouped.")]
LinkageOption = Annotated[Linkage, _choice("--linkage", Linkage, "How far apart two clusters are.")]
MergeOption = Annotated[Merge, _choice("--merge", Merge, "How the members of a cluster are weighted.")]
RouterOption = Annotated[RouterPolicy, _choice("--router", RouterPolicy, "Which router row a cluster gets.")]
LayoutOption = Annotated[Layout, _choice("--layout", Layout, "How the merged experts are written down.")]

CalibrationOption = Annotated[
    str,
    _calibration(
        "--calibration",
        metavar="NAME_OR_FILE",
        help="bundled, c4, a file (.jsonl, .txt, .parquet, .csv, .npy) or a Hub dataset id.",
    ),
]
SamplesOption = Annotated[
    int, _calibration("--samples", min=1, metavar="INT", help="Sequences to observe the experts on.")
]
SequenceLengthOption = Annotated[
    int | None,
    _calibration(
        "--sequence-length",
        min=1,
        metavar="INT",
        show_default="2048, or the model's limit if lower",
        help="Tokens per sequence.",
    ),
]
SeedOption = Annotated[int, _calibration("--seed", min=0, metavar="INT", help="Seed of the document shuffle.")]
TextColumnOption = Annotated[
    str | None,
    _calibration(
        "--text-column",
        metavar="NAME",
        show_default="messages, text or content",
        help="Column that holds the text.",
    ),
]

DeviceOption = Annotated[
    str,
    _compute(
        "--device",
        parser=parse_device,
        metavar=f"[{'|'.join(Device)}|cuda:N]",
        help="Where the layers run.",
    ),
]
BatchTokensOption = Annotated[
    int | None,
    _compute(
        "--batch-tokens",
        min=1,
        metavar="INT",
        show_default="suits the device",
        help="Tokens per micro-batch; halves itself when memory runs out.",
    ),
]
MaxMemoryOption = Annotated[
    int | None,
    _compute(
        "--max-memory",
        parser=parse_size,
        metavar="SIZE",
        show_default="no limit",
        help="Refuse to start if more memory would be needed, e.g. 24GB.",
    ),
]

OutputOption = Annotated[
    Path | None,
    _output("--output", "-o", metavar="DIR", show_default="./NAME-hcsmoe-Ke", help="Folder of the result."),
]
MaxShardSizeOption = Annotated[
    str,
    _output("--max-shard-size", parser=parse_shard_size, metavar="SIZE", help="Upper size of one written shard."),
]
OverwriteOption = Annotated[bool, _output_flag("--overwrite", help="Replace a checkpoint that is already there.")]
DryRunOption = Annotated[
    bool, _output_flag("--dry-run", help="Show what would be done and needed; reads headers only.")
]
JsonOption = Annotated[bool, _output_flag("--json", help="Print one JSON document.")]
QuietOption = Annotated[bool, _output_flag("--quiet", "-q", help="Print only the path of the result.")]

RevisionOption = Annotated[
    str | None, _hub("--revision", metavar="REVISION", show_default="main", help="Branch, tag or commit.")
]
TokenOption = Annotated[
    str | None,
    _hub("--token", metavar="TOKEN", envvar="HF_TOKEN", show_default="the stored login", help="Access token."),
]
CacheDirOption = Annotated[
    Path | None,
    _hub("--cache-dir", metavar="DIR", show_default="the Hub's own", help="Folder for downloads."),
]
