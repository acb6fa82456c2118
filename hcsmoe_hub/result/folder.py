"""Writes the files of a result to the folder in which it lies until it is complete."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from hcsmoe_hub.checkpoint.durable import copy_file, write_bytes, write_json
from hcsmoe_hub.checkpoint.shared_writer import SharedWriter
from hcsmoe_hub.checkpoint.source import Source
from hcsmoe_hub.checkpoint.tensors import INDEX_FILE
from hcsmoe_hub.checkpoint.writer import Recipient, ShardWriter
from hcsmoe_hub.machine import ranks
from hcsmoe_hub.methods.merging import NeuronOrigins
from hcsmoe_hub.model.width import neurons_of
from hcsmoe_hub.options import Layout
from hcsmoe_hub.planning.conversion_plan import ConversionPlan
from hcsmoe_hub.planning.mapped_layout import mapped_config
from hcsmoe_hub.planning.neuron_file import describe_neurons, neuron_file
from hcsmoe_hub.planning.own_code import OWN_CODE
from hcsmoe_hub.report import NEURONS_FILE, REPORT_FILE, ConversionReport, NeuronRecord


@contextmanager
def open_writer(
    plan: ConversionPlan, recipient: Recipient | None, *, keeps_digests: bool = False
) -> Iterator[ShardWriter]:
    """Opens the shard writer.

    Args:
        plan: The conversion.
        recipient: Receives finished shards.
        keeps_digests: Whether its ``sync`` returns digests.
    """
    # Of a run that was interrupted after the last shard: until they are written again, nothing may look complete.
    for name in (INDEX_FILE, "config.json"):
        (plan.staging / name).unlink(missing_ok=True)
    make = ShardWriter if ranks.size() == 1 else SharedWriter
    writer = make(plan.staging, plan.shards, recipient, keeps_digests=keeps_digests)
    try:
        yield writer
    finally:
        writer.close()


def write_neurons(plan: ConversionPlan, origins: Mapping[int, NeuronOrigins]) -> NeuronRecord | None:
    """Writes where the neurons of a result come from.

    Args:
        plan: The conversion.
        origins: By decoder layer.

    Returns:
        What the report says of the file; ``None`` if there is nothing to list.
    """
    if not origins:
        return None
    content = neuron_file(origins)
    write_bytes(plan.staging / NEURONS_FILE, content)
    after = next(iter(origins.values())).neuron_CI.shape[1]
    return describe_neurons(content, before=neurons_of(plan.model), after=after)


def write_result(plan: ConversionPlan, writer: ShardWriter, report: ConversionReport) -> None:
    """Writes everything but the weights and the card."""
    copy_sidecars(plan.model.source, plan.sidecars, plan.staging)
    write_json(plan.staging / REPORT_FILE, report.as_dict())
    source = plan.model.source
    config = plan.config
    if plan.recipe.layout is Layout.MAPPED:
        config = mapped_config(config, plan.model, {layer.layer: layer.labels for layer in report.layers})
    if (code := OWN_CODE.get(plan.recipe.layout)) is not None:
        write_bytes(plan.staging / code.file, code.source(plan.model).encode())
    if config == source.config:
        # An unchanged config keeps its formatting too.
        write_bytes(plan.staging / "config.json", source.fetch("config.json").read_bytes())
    else:
        write_json(plan.staging / "config.json", config)
    writer.finish()


def copy_sidecars(source: Source, files: Iterable[str], folder: Path) -> None:
    """Copies sidecar files into the result."""
    for file in files:
        target = folder / file
        target.parent.mkdir(parents=True, exist_ok=True)
        copy_file(source.fetch(file), target)
