"""``hcsmoe convert``: plan, and unless it is a dry run, carry out the plan."""

import shlex
import time

from hcsmoe_hub.cli import options as cli
from hcsmoe_hub.cli import summary
from hcsmoe_hub.cli.documents import available, plan_document
from hcsmoe_hub.cli.libraries import collector_paused, prepare_libraries
from hcsmoe_hub.cli.output import Output
from hcsmoe_hub.cli.progress import listening
from hcsmoe_hub.convert import execute, plan_conversion
from hcsmoe_hub.events import Stage, StageFinished, StageStarted
from hcsmoe_hub.options import (
    DEFAULT_MAX_SHARD_SIZE,
    CalibrationOptions,
    ConvertOptions,
    Device,
    MethodOptions,
)

METHOD = MethodOptions()
CALIBRATION = CalibrationOptions()
EXAMPLES = """[bold]Examples[/]
$ hcsmoe convert mistralai/Mixtral-8x7B-v0.1 --experts 4 --dry-run
$ hcsmoe convert Qwen/Qwen3-30B-A3B --experts 96 --output qwen3-96e
$ hcsmoe convert ./my-mixtral -e 6 --calibration domain.jsonl --samples 64"""


def convert(
    source: cli.SourceArgument,
    experts: cli.ExpertsOption,
    experts_per_token: cli.ExpertsPerTokenOption = None,
    similarity: cli.SimilarityOption = METHOD.similarity,
    distance: cli.DistanceOption = METHOD.distance,
    clustering: cli.ClusteringOption = METHOD.clustering,
    linkage: cli.LinkageOption = METHOD.linkage,
    merge: cli.MergeOption = METHOD.merge,
    router: cli.RouterOption = METHOD.router,
    layout: cli.LayoutOption = METHOD.layout,
    calibration: cli.CalibrationOption = CALIBRATION.dataset,
    samples: cli.SamplesOption = CALIBRATION.samples,
    sequence_length: cli.SequenceLengthOption = CALIBRATION.sequence_length,
    seed: cli.SeedOption = CALIBRATION.seed,
    text_column: cli.TextColumnOption = CALIBRATION.text_column,
    device: cli.DeviceOption = Device.AUTO,
    batch_tokens: cli.BatchTokensOption = None,
    max_memory: cli.MaxMemoryOption = None,
    output: cli.OutputOption = None,
    max_shard_size: cli.MaxShardSizeOption = DEFAULT_MAX_SHARD_SIZE,
    overwrite: cli.OverwriteOption = False,
    dry_run: cli.DryRunOption = False,
    as_json: cli.JsonOption = False,
    quiet: cli.QuietOption = False,
    revision: cli.RevisionOption = None,
    token: cli.TokenOption = None,
    cache_dir: cli.CacheDirOption = None,
) -> None:
    """Merge experts and write a checkpoint with fewer of them."""
    method = MethodOptions(
        similarity=similarity,
        distance=distance,
        clustering=clustering,
        linkage=linkage,
        merge=merge,
        router=router,
        layout=layout,
    )
    text = CalibrationOptions(
        dataset=calibration, samples=samples, sequence_length=sequence_length, seed=seed, text_column=text_column
    )
    options = ConvertOptions(
        experts=experts,
        experts_per_token=experts_per_token,
        method=method,
        calibration=text,
        output=output,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        device=device,
        batch_tokens=batch_tokens,
        max_memory_bytes=max_memory,
    )
    sink = Output(as_json=as_json, quiet=quiet)
    with collector_paused():
        prepare_libraries()
    run = _dry_run if dry_run else _convert
    run(source, options, cli.Hub(revision=revision, token=token, cache_dir=cache_dir), sink)


def _convert(source: str, options: ConvertOptions, hub: cli.Hub, sink: Output) -> None:
    start = time.perf_counter()
    with listening(sink) as listener:
        listener(StageStarted(Stage.PLAN, 1))
        with collector_paused():
            plan = plan_conversion(source, options, **hub.arguments())
        listener(StageFinished(Stage.PLAN, time.perf_counter() - start))
        report = execute(plan, listener=listener)
    document = {**report.as_dict(), "output": str(plan.output)}
    human = summary.conversion(document, check_mark=sink.check_mark, seconds=time.perf_counter() - start)
    sink.result(document, human=human, brief=str(plan.output))
    sink.hint(f"check it with 'hcsmoe verify {shlex.quote(str(plan.output))}'")


def _dry_run(source: str, options: ConvertOptions, hub: cli.Hub, sink: Output) -> None:
    with sink.working("Reading headers"):
        plan = plan_conversion(source, options, **hub.arguments())
        document = plan_document(plan)
        human = summary.dry_run(document, available(plan))
    sink.result(document, human=human, brief=str(plan.output))
    for message in plan.warnings:
        sink.warn(message)
    sink.hint("drop --dry-run to convert")
