"""Runs a plan: calibration tokens in, converted layers out."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hcsmoe_hub.calibration.calibration_set import CalibrationSet
from hcsmoe_hub.calibration.text import load_calibration
from hcsmoe_hub.checkpoint.formats import LogicalTensor
from hcsmoe_hub.checkpoint.lazy_tensor import OnRead, read_logical
from hcsmoe_hub.checkpoint.pieces import Step
from hcsmoe_hub.checkpoint.reader import TensorReader
from hcsmoe_hub.checkpoint.writer import ShardWriter
from hcsmoe_hub.events import Listener, Stage, StageAdvanced, Warned
from hcsmoe_hub.layer.picture import LayerPicture
from hcsmoe_hub.layer.reducer import LayerReducer
from hcsmoe_hub.layer.spectra import Spectra
from hcsmoe_hub.layer.stored_experts import StoredExperts
from hcsmoe_hub.machine.allocator import mapping_large_tensors
from hcsmoe_hub.machine.device import resolve_device
from hcsmoe_hub.methods.clustering import LossTable
from hcsmoe_hub.methods.merging import NeuronOrigins
from hcsmoe_hub.model.layer_loader import LayerLoader
from hcsmoe_hub.model.microbatch import MicroBatcher
from hcsmoe_hub.model.transformers_seam import sequential_loading
from hcsmoe_hub.observation.statistics import Call
from hcsmoe_hub.observation.statistics_file import open_statistics
from hcsmoe_hub.options import CalibrationOptions, default_samples
from hcsmoe_hub.pipeline.held_out import HeldOut, why_not_measured
from hcsmoe_hub.pipeline.losses import predict_from_statistics
from hcsmoe_hub.pipeline.merged_stream import MergedStream
from hcsmoe_hub.pipeline.passes import (
    ConvertingPass,
    Observe,
    ObservingPass,
    ResultWriter,
    Work,
    convert_from_statistics,
    observing,
    recalling,
)
from hcsmoe_hub.pipeline.self_text import sample_from_source
from hcsmoe_hub.pipeline.stream import StreamedLayer, lengths, make_batcher, stream
from hcsmoe_hub.pipeline.streams import Part, Streams
from hcsmoe_hub.planning.conversion_plan import ConversionPlan
from hcsmoe_hub.planning.make import make_plan
from hcsmoe_hub.report import LayerReport
from hcsmoe_hub.result.make_report import describe


def load_tokens(plan: ConversionPlan, emit: Listener) -> CalibrationSet:
    """Reads the calibration set.

    Raises:
        HcsmoeError: If it cannot be found or turned into tokens.
    """
    source = plan.model.source
    folder = source.fetch("config.json").parent
    for file in plan.sidecars:
        source.fetch(file)
    vocab_size = plan.model.skeleton.text_config.vocab_size
    sample = partial(sample_from_source, plan)
    loaded = load_calibration(
        plan.calibration, tokenizer_folder=folder, vocab_size=vocab_size, sample=sample, emit=emit
    )
    found, planned = len(loaded.token_ids), plan.calibration.sequences
    # What is wanted for a fit is more than many texts have; short of the usual number it deserves a second look.
    usual = default_samples(plan.calibration.sequence_length, fits=False)
    if found < (planned if plan.options.calibration.samples else min(planned, usual)):
        emit(Warned(f"{plan.calibration.dataset} fills {found} of {planned} calibration sequences."))
    return loaded


def observe(plan: ConversionPlan, calibration: CalibrationSet, path: Path | None, emit: Listener) -> ConversionPlan:
    """Collects the statistics that a budget or the choice among the shapes under a target depends on.

    Args:
        plan: A plan that is not final.
        calibration: What the model runs on.
        path: Statistics file to write; ``None`` if only a shape is to be chosen.
        emit: Called with progress and warnings.

    Returns:
        The final plan, which converts from the statistics if there is a file of them.
    """
    token_ids = calibration.token_ids
    batcher = batcher_for(plan, token_ids)
    with (
        nullcontext() if path is None else open_statistics(path) as statistics,
        open_reader(plan, plan.observing_order, emit) as reader,
    ):
        observer = ObservingPass(plan, batcher, statistics, domains=calibration.domains)

        def visit(layer: StreamedLayer, inputs: Call) -> Any:
            output = observer.visit(layer, inputs)
            emit(StageAdvanced(Stage.OBSERVE, f"layer {layer.index}"))
            return output

        with open_loader(plan, reader, batcher) as loader:
            loader.load(None)
            stream(plan.model.skeleton, loader, visit, token_ids, batcher=batcher)
        if statistics is not None:
            statistics.add_text(calibration, None)
            describe(statistics, plan, calibration)
    if path is None:
        return _with_losses(plan, observer.losses)
    options = replace(plan.options, statistics=path, calibration=CalibrationOptions())
    return replace(
        make_plan(plan.model.source, options, on_device=plan.on_device), options=plan.options, output=plan.output
    )


def choose_from_statistics(plan: ConversionPlan, emit: Listener) -> ConversionPlan:
    """Chooses a shape under a target from statistics that were collected for another target, or without one.

    Args:
        plan: A plan with statistics that is not final.
        emit: Called with progress and warnings.

    Returns:
        The final plan.
    """
    assert plan.statistics is not None, "there are statistics to choose from"
    device = resolve_device(plan.options.device)
    with (
        open_reader(plan, plan.observing_order, emit) as reader,
        open_loader(plan, reader, MicroBatcher(1, 1, device)) as loader,
    ):
        return _with_losses(plan, predict_from_statistics(plan, plan.statistics, loader, device, emit))


def _with_losses(plan: ConversionPlan, losses: Mapping[int, LossTable]) -> ConversionPlan:
    """The same plan with its shape chosen."""
    found = make_plan(plan.model.source, plan.options, on_device=plan.on_device, losses=losses)
    return replace(found, output=plan.output)


def batcher_for(plan: ConversionPlan, token_ids: Tensor) -> MicroBatcher:
    """What cuts sequences ``[B, S]`` into micro-batches, where a plan's layers run."""
    device = resolve_device(plan.options.device)
    return make_batcher(plan.model.skeleton, token_ids, batch_tokens=plan.batch_tokens, device=device)


@contextmanager
def open_reader(plan: ConversionPlan, steps: Sequence[Step], emit: Listener) -> Iterator[TensorReader]:
    """Reads the source in the order of a pass, whose shards are downloaded ahead of it."""
    source = plan.model.source
    with (
        source.feed(steps, low_disk=plan.options.low_disk, emit=emit) as feed,
        TensorReader(source, feed=feed, emit=emit) as reader,
    ):
        yield reader


@contextmanager
def open_loader(
    plan: ConversionPlan, reader: TensorReader, batcher: MicroBatcher, on_read: OnRead = lambda *read: None
) -> Iterator[LayerLoader]:
    """Loads the layers of the source."""
    model = plan.model
    kept = {tensor.name for block in model.blocks for tensor in block.router}
    kept |= {name for block in model.blocks for name in block.tables}

    with mapping_large_tensors(), sequential_loading():
        loader = LayerLoader(model.skeleton, model.placement, reader, device=batcher.device, kept=kept, on_read=on_read)
        try:
            yield loader
        finally:
            loader.close()


def stored_experts(plan: ConversionPlan) -> StoredExperts:
    """What rounds experts to the format of a plan's source, if the result keeps that."""
    model = plan.model
    experts = {tensor.name for block in model.blocks for tensor in block.experts} if plan.keeps_format else set()
    return StoredExperts(model.tensors, model.groups, frozenset(experts))


def _copy(
    plan: ConversionPlan, writer: ShardWriter, tensor: LogicalTensor, parts: Mapping[str, Tensor], values: Tensor
) -> None:
    """Writes a tensor that does not change: its bytes, or its numbers in the dtype of the model."""
    if tensor.name in plan.account.copied:
        for role, part in parts.items():
            writer.write(tensor.parts[role].name, part)
    elif tensor.name in plan.account.decoded:
        writer.write(tensor.name, values)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Converted:
    """What a run leaves besides the weights.

    Attributes:
        layers: A report per MoE layer.
        pictures: A picture per MoE layer, if the plan asks for a figure.
        spectra: Singular values by layer, if it also makes factors of the experts.
        held_out: Held-out sequences after their way through both models; ``None`` where nothing is measured.
        origins: Where the neurons of the experts come from, by layer, where these were chosen one by one.
    """

    layers: list[LayerReport]
    pictures: list[LayerPicture]
    spectra: dict[int, Spectra]
    held_out: HeldOut | None
    origins: dict[int, NeuronOrigins]


def run(plan: ConversionPlan, writer: ShardWriter, calibration: CalibrationSet | None, emit: Listener) -> Converted:
    """Converts every layer.

    Args:
        plan: A final plan.
        writer: Takes the weights of the result.
        calibration: What the model runs on; ``None`` where a statistics file has no text.
        emit: Called with progress and warnings.
    """
    device = resolve_device(plan.options.device)
    batcher = MicroBatcher(1, 1, device)
    if calibration is not None:
        batcher = batcher_for(plan, calibration.token_ids)
    stored = stored_experts(plan)
    work = Work(
        plan=plan,
        batcher=batcher,
        reducer=LayerReducer(plan, emit, stored),
        writer=ResultWriter(plan, writer, emit, stored),
    )

    def on_read(tensor: LogicalTensor, parts: Mapping[str, Tensor], values: Tensor) -> None:
        stored.remember(tensor, parts)
        _copy(plan, writer, tensor, parts, values)

    with (
        open_reader(plan, plan.reading_order, emit) as reader,
        open_loader(plan, reader, batcher, on_read) as loader,
    ):
        loader.load(None)
        work.writer.write(None, {})
        held_out = _convert_layers(work, loader, calibration, emit)
        for tensor in map(plan.model.tensors.__getitem__, plan.account.unread):
            if tensor.name in plan.account.decoded:
                writer.write(tensor.name, read_logical(tensor, reader)[1])
                continue
            for part in tensor.parts.values():
                writer.write(part.name, reader.read(part))
    reducer = work.reducer
    return Converted(
        layers=reducer.reports,
        pictures=reducer.pictures,
        spectra=reducer.spectra,
        held_out=held_out,
        origins=reducer.origins,
    )


def _convert_layers(
    work: Work, loader: LayerLoader, calibration: CalibrationSet | None, emit: Listener
) -> HeldOut | None:
    """Converts every layer while the calibration set, held-out sequences, or neither run through them."""
    plan = work.plan
    measured_ids = torch.empty(0, 0, dtype=torch.int64)
    if calibration is not None:
        # A model that is trained as a whole afterwards is measured when that is done.
        is_measured = why_not_measured(plan, calibration) is None and not plan.trains_model
        measured_ids = calibration.measured_ids if is_measured else calibration.measured_ids[:0]
    if plan.runs_source:
        assert calibration is not None, "there are tokens to observe on"
        hidden = _observe_and_convert(work, loader, calibration, measured_ids, emit)
    else:
        hidden = _recall_and_convert(work, loader, calibration, measured_ids, emit)
    if not hidden:
        return None
    assert calibration is not None, "only a calibration set has held-out sequences"
    return HeldOut(
        skeleton=plan.model.skeleton,
        device=work.batcher.device,
        ids_MS=measured_ids,
        domains=calibration.measured_domains,
        source_MSH=hidden[Part.MEASURED],
        result_MSH=hidden[Part.MEASURED_REDUCED],
    )


def _observe_and_convert(
    work: Work, loader: LayerLoader, calibration: CalibrationSet, measured_ids: Tensor, emit: Listener
) -> dict[Part, Tensor]:
    """Converts every layer while all sequences run through it; returns as ``_stream``."""
    plan, token_ids = work.plan, calibration.token_ids
    path = plan.options.statistics if plan.statistics is None else None
    streams = Streams(
        token_ids,
        measured_ids,
        doubles=plan.recipe.propagates,
        lengths=lengths(plan.model.skeleton, token_ids),
    )
    with nullcontext() if path is None else open_statistics(path) as statistics:
        observer = ObservingPass(plan, work.batcher, statistics, domains=calibration.domains)
        hidden = _stream(work, loader, observing(observer), streams, merged=_merged_stream(work, emit))
        if statistics is not None:
            statistics.add_text(calibration, hidden.get(Part.MEASURED))
            describe(statistics, plan, calibration)
    return hidden


def _recall_and_convert(
    work: Work, loader: LayerLoader, calibration: CalibrationSet | None, measured_ids: Tensor, emit: Listener
) -> dict[Part, Tensor]:
    """Converts every layer from statistics; only what an earlier run did not see runs. Returns as ``_stream``."""
    plan, file, layers = work.plan, work.plan.statistics, range(len(work.plan.model.skeleton.layers))
    assert file is not None, "there are statistics to convert from"
    propagates, hidden = plan.recipe.propagates, dict[Part, Tensor]()
    if propagates or len(measured_ids):
        assert calibration is not None, "there are tokens to run"
        recalled, source_MSH = {Part.SOURCE}, file.measured_states()
        if source_MSH is not None and len(measured_ids):
            recalled.add(Part.MEASURED)
            hidden[Part.MEASURED] = source_MSH.to(plan.model.skeleton.dtype)
        streams = Streams(
            calibration.token_ids,
            measured_ids,
            doubles=propagates,
            lengths=lengths(plan.model.skeleton, calibration.token_ids),
            recalled=recalled,
        )
        merged = _merged_stream(work, emit)
        hidden |= _stream(work, loader, recalling(file), streams, merged=merged, with_head=propagates)
        # An MTP head that did not run is converted after the layers that did.
        layers = layers[len(layers) if propagates else plan.model.skeleton.depth :]
    convert_from_statistics(work, file, loader, layers)
    return hidden


def _merged_stream(work: Work, emit: Listener) -> MergedStream | None:
    """What finds out what blocks see in the reduced model, if they are fitted to that."""
    recipe = work.plan.recipe
    return MergedStream(work.batcher, emit, compensates=recipe.refits) if recipe.propagates else None


def _stream(
    work: Work,
    loader: LayerLoader,
    observe: Observe,
    streams: Streams,
    *,
    merged: MergedStream | None,
    with_head: bool = True,
) -> dict[Part, Tensor]:
    """Runs the model over all sets of hidden states.

    Args:
        work: What layers are converted with.
        loader: Brings the weights of a layer.
        observe: Observes a block, or recalls what was observed of it.
        streams: The sets.
        merged: Finds what blocks are fitted to in the reduced model; ``None`` if they are fitted to the source's.
        with_head: Whether calibration sequences run, which an MTP head needs.

    Returns:
        The hidden states ``[M, S, H]`` of the held-out sequences after the last norm, by set.
    """
    held_out = batcher_for(work.plan, streams.measured_ids) if len(streams.measured_ids) else work.batcher
    converting = ConvertingPass(work, held_out, observe, streams=streams, merged=merged)
    hidden_RSH = stream(
        work.plan.model.skeleton,
        loader,
        converting.visit,
        streams.batch,
        batcher=work.batcher,
        with_head=with_head,
    )
    return streams.measured(hidden_RSH)
