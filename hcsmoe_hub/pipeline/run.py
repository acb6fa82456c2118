"""Runs a plan: calibration tokens in, converted layers out."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from hcsmoe_hub.calibration.calibration_set import CalibrationSet
from hcsmoe_hub.calibration.text import load_calibration
from hcsmoe_hub.checkpoint.background_writer import BackgroundWriter
from hcsmoe_hub.checkpoint.formats import LogicalTensor
from hcsmoe_hub.checkpoint.lazy_tensor import read_logical
from hcsmoe_hub.checkpoint.writer import ShardWriter
from hcsmoe_hub.events import Listener, Stage, Warned
from hcsmoe_hub.layer.kept_layers import restore_layer
from hcsmoe_hub.layer.picture import LayerPicture
from hcsmoe_hub.layer.reducer import LayerReducer
from hcsmoe_hub.layer.spectra import Spectra
from hcsmoe_hub.machine import ranks
from hcsmoe_hub.machine.device import resolve_device
from hcsmoe_hub.machine.finite import are_finite
from hcsmoe_hub.methods.clustering import LossTable
from hcsmoe_hub.methods.merging import NeuronOrigins
from hcsmoe_hub.model.layer_loader import LayerLoader
from hcsmoe_hub.model.microbatch import MicroBatcher
from hcsmoe_hub.options import CalibrationOptions, default_samples
from hcsmoe_hub.pipeline.held_out import HeldOut, why_not_measured
from hcsmoe_hub.pipeline.layer_steps import AtOnce, LayerSteps
from hcsmoe_hub.pipeline.losses import predict_from_statistics
from hcsmoe_hub.pipeline.merged_stream import MergedStream
from hcsmoe_hub.pipeline.observing_pass import ObservedLayers, ObservingPass
from hcsmoe_hub.pipeline.overlap import WrittenLayers, background_writer, copy_unchanged
from hcsmoe_hub.pipeline.passes import (
    ConvertingPass,
    Observe,
    Work,
    convert_from_statistics,
    observing,
    recalling,
)
from hcsmoe_hub.pipeline.progress import OBSERVED, WRITTEN, Progress
from hcsmoe_hub.pipeline.reading import batcher_for, open_loader, open_reader, remaining, stored_experts
from hcsmoe_hub.pipeline.result_writer import ResultWriter, copied_although
from hcsmoe_hub.pipeline.self_text import sample_from_source
from hcsmoe_hub.pipeline.sharding import all_rows, own_sequences, statistics_writer, writes
from hcsmoe_hub.pipeline.stream import lengths, stream
from hcsmoe_hub.pipeline.streams import Part, Streams
from hcsmoe_hub.pipeline.training_states import overwritten_tensors
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


def observe(
    plan: ConversionPlan, calibration: CalibrationSet, path: Path | None, progress: Progress, emit: Listener
) -> ConversionPlan:
    """Collects the statistics that a budget or the choice among the shapes under a target depends on.

    Args:
        plan: A plan that is not final.
        calibration: What the model runs on.
        path: Statistics file to write; ``None`` if only a shape is to be chosen.
        progress: What an interrupted run has done, and where that is kept.
        emit: Called with progress and warnings.

    Returns:
        The final plan, which converts from the statistics if there is a file of them.
    """
    if path is None:
        return _with_losses(plan, _observe(plan, calibration, None, progress, emit).losses)
    # What an interrupted run has collected is complete once it has its name.
    if not progress.lines(OBSERVED) or not ranks.all_agree(path.exists()):
        _observe(plan, calibration, path, progress, emit)
        progress.append(OBSERVED)
    options = replace(plan.options, statistics=path, calibration=CalibrationOptions())
    # A file that the first rank alone has written is complete once all have come here.
    ranks.every(None)
    made = ranks.alike(lambda: make_plan(plan.model.source, options, device_room=plan.device_room))
    return replace(made, options=plan.options, output=plan.output)


def _observe(
    plan: ConversionPlan, calibration: CalibrationSet, path: Path | None, progress: Progress, emit: Listener
) -> ObservingPass:
    """Runs the model over the calibration set; arguments are those of ``observe``."""
    token_ids = own_sequences(calibration).token_ids
    batcher, steps = batcher_for(plan, token_ids), LayerSteps(progress, Stage.OBSERVE, AtOnce())
    with (
        statistics_writer(plan, path, steps) as statistics,
        open_reader(plan, remaining(plan, plan.observing_order, steps.last), emit) as reader,
        open_loader(plan, reader, batcher) as loader,
    ):
        steps.announce(emit)
        observer = ObservingPass(plan, batcher, statistics, domains=calibration.domains, collects=path is not None)
        observed = ObservedLayers(observer, steps, emit, skeleton=plan.model.skeleton, token_ids=token_ids)
        loader.load(None)
        source_length = plan.calibration.source_length
        stream(plan.model.skeleton, loader, observed.visitor, token_ids, batcher=batcher, source_length=source_length)
        steps.confirm()
        if statistics is not None:
            statistics.add_text(calibration, None)
            progress.append(WRITTEN, digest=describe(statistics, plan, calibration))
    return observer


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
    found = make_plan(plan.model.source, plan.options, device_room=plan.device_room, losses=losses)
    return replace(found, output=plan.output)


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


def run(
    plan: ConversionPlan,
    shards: ShardWriter,
    calibration: CalibrationSet | None,
    progress: Progress,
    emit: Listener,
) -> Converted:
    """Converts every layer: the next one is read and the last one is written meanwhile.

    Args:
        plan: A final plan.
        shards: Takes the weights of the result; when this returns, all of them are written.
        calibration: What the model runs on; ``None`` where a statistics file has no text.
        progress: What an interrupted run has done, and where that is kept.
        emit: Called with progress and warnings.
    """
    device = resolve_device(plan.options.device)
    batcher = MicroBatcher(1, 1, device)
    if calibration is not None:
        batcher = batcher_for(plan, own_sequences(calibration).token_ids)
    with background_writer(plan, shards, device) as writer:
        steps = LayerSteps(progress, Stage.CONVERT, WrittenLayers(writer, shards))
        shards.restore(steps.digests, sent=progress.sent(), replaced=overwritten_tensors(progress))
        stored = stored_experts(plan)
        work = Work(
            plan=plan,
            batcher=batcher,
            reducer=LayerReducer(plan, emit, stored),
            writer=ResultWriter(plan, writer, emit, stored),
            stored=stored,
            steps=steps,
        )
        for layer, kept in enumerate(steps.results):
            restore_layer(work.reducer, layer, kept)
        steps.announce(emit)
        converted = _run(work, writer, calibration, emit)
        work.settle()
    shards.share()
    return converted


def _run(work: Work, writer: BackgroundWriter, calibration: CalibrationSet | None, emit: Listener) -> Converted:
    plan, batcher, stored = work.plan, work.batcher, work.stored
    layers = {name: layer for layer, group in plan.model.groups.items() for name in group.targets}

    def on_read(tensor: LogicalTensor, parts: Mapping[str, Tensor], values: Tensor) -> None:
        stored.remember(tensor, parts)
        if writes(layers[tensor.name]):
            copy_unchanged(plan, writer, tensor, parts, values)

    with (
        open_reader(plan, remaining(plan, plan.reading_order, work.steps.last), emit) as reader,
        open_loader(plan, reader, batcher, on_read) as loader,
    ):
        loader.load(None)
        work.writer.write(None, {})
        if work.steps.last < 0:
            # A run that goes on has taken over the warning.
            work.writer.warn_of_broken(None)
        held_out = _convert_layers(work, loader, calibration, emit)
        for number, tensor in enumerate(map(plan.model.tensors.__getitem__, plan.account.unread)):
            if not writes(number):
                continue
            if tensor.name in plan.account.decoded:
                if tensor.name not in work.steps.digests:
                    writer.write(tensor.name, read_logical(tensor, reader)[1])
                continue
            for part in tensor.parts.values():
                if part.name in work.steps.digests:
                    continue
                values = reader.read(part)
                writer.write(part.name, values)
                if not are_finite(values):
                    emit(copied_although(part.name))
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
        own = own_sequences(calibration)
        measured_ids = own.measured_ids if is_measured else own.measured_ids[:0]
    if plan.runs_source:
        assert calibration is not None, "there are tokens to observe on"
        hidden = _observe_and_convert(work, loader, calibration, measured_ids, emit)
    else:
        hidden = _recall_and_convert(work, loader, calibration, measured_ids, emit)
    if calibration is None or not is_measured:
        return None
    # A rank that has none of few held-out sequences measures with the others.
    nothing = torch.empty(0)
    return HeldOut(
        skeleton=plan.model.skeleton,
        device=work.batcher.device,
        ids_MS=measured_ids,
        domains=own.measured_domains,
        source_MSH=hidden.get(Part.MEASURED, nothing),
        result_MSH=hidden.get(Part.MEASURED_REDUCED, nothing),
        source_length=plan.calibration.source_length,
    )


def _observe_and_convert(
    work: Work, loader: LayerLoader, calibration: CalibrationSet, measured_ids: Tensor, emit: Listener
) -> dict[Part, Tensor]:
    """Converts every layer while all sequences run through it; returns as ``_stream``."""
    plan, token_ids = work.plan, own_sequences(calibration).token_ids
    path = plan.options.statistics if plan.statistics is None else None
    streams = Streams(
        token_ids,
        measured_ids,
        doubles=plan.recipe.propagates,
        lengths=lengths(plan.model.skeleton, token_ids, plan.calibration.source_length),
    )
    with statistics_writer(plan, path, work.steps) as statistics:
        observer = ObservingPass(plan, work.batcher, statistics, domains=calibration.domains, collects=path is not None)
        hidden = _stream(work, loader, observing(observer), streams, merged=_merged_stream(work, emit))
        measured = None if path is None else all_rows(hidden.get(Part.MEASURED))
        # The writer's thread brings the file to the disk after each layer, for which it has to be open.
        work.settle()
        if statistics is not None:
            statistics.add_text(calibration, measured)
            work.steps.progress.append(WRITTEN, digest=describe(statistics, plan, calibration))
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
            hidden[Part.MEASURED] = source_MSH[ranks.block(len(source_MSH))].to(plan.model.skeleton.dtype)
        token_ids = own_sequences(calibration).token_ids
        streams = Streams(
            token_ids,
            measured_ids,
            doubles=propagates,
            lengths=lengths(plan.model.skeleton, token_ids, plan.calibration.source_length),
            recalled=recalled,
        )
        merged = _merged_stream(work, emit)
        hidden |= _stream(work, loader, recalling(file), streams, merged=merged, with_head=propagates)
        # An MTP head that did not run is converted after the layers that did.
        layers = layers[len(layers) if propagates else plan.model.skeleton.depth :]
    convert_from_statistics(work, file, loader, [layer for layer in layers if layer > work.steps.last])
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
        converting.visitor(with_head=with_head),
        streams.batch,
        batcher=work.batcher,
        source_length=work.plan.calibration.source_length,
    )
    return streams.measured(hidden_RSH)
