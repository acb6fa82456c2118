"""Runs a plan: calibration tokens in, converted layers out."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from hcsmoe_hub.layer.stored_experts import StoredExperts
from hcsmoe_hub.machine.allocator import mapping_large_tensors
from hcsmoe_hub.machine.device import peak_memory, resolve_device
from hcsmoe_hub.model.layer_loader import LayerLoader
from hcsmoe_hub.model.microbatch import MicroBatcher
from hcsmoe_hub.model.transformers_seam import sequential_loading
from hcsmoe_hub.observation.statistics import Call
from hcsmoe_hub.observation.statistics_file import open_statistics
from hcsmoe_hub.options import CalibrationOptions, default_samples
from hcsmoe_hub.pipeline.merged_stream import MergedStream
from hcsmoe_hub.pipeline.passes import ConvertingPass, ObservingPass, ResultWriter, convert_from_statistics
from hcsmoe_hub.pipeline.stream import StreamedLayer, lengths, make_batcher, stream
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
    loaded = load_calibration(plan.calibration, tokenizer_folder=folder, vocab_size=vocab_size, emit=emit)
    found, planned = len(loaded.token_ids), plan.calibration.sequences
    # What is wanted for a fit is more than many texts have; short of the usual number it deserves a second look.
    usual = default_samples(plan.calibration.sequence_length, fits=False)
    if found < (planned if plan.options.calibration.samples else min(planned, usual)):
        emit(Warned(f"{plan.calibration.dataset} fills {found} of {planned} calibration sequences."))
    return loaded


def observe(plan: ConversionPlan, calibration: CalibrationSet, path: Path, emit: Listener) -> ConversionPlan:
    """Collects the statistics that a budget depends on.

    Args:
        plan: A plan that is not final.
        calibration: What the model runs on.
        path: Statistics file to write.
        emit: Called with progress and warnings.

    Returns:
        The final plan, which converts from the statistics.
    """
    token_ids = calibration.token_ids
    batcher = _batcher(plan, token_ids)
    with open_statistics(path) as statistics, _reader(plan, plan.observing_order, emit) as reader:
        observing = ObservingPass(plan, batcher, statistics, domains=calibration.domains)

        def visit(layer: StreamedLayer, inputs: Call) -> Any:
            output = observing.visit(layer, inputs)
            emit(StageAdvanced(Stage.OBSERVE, f"layer {layer.index}"))
            return output

        with _loader(plan, reader, batcher) as loader:
            loader.load(None)
            stream(plan.model.skeleton, loader, visit, token_ids, batcher=batcher)
        describe(statistics, plan, token_ids)
    options = replace(plan.options, statistics=path, calibration=CalibrationOptions())
    return replace(
        make_plan(plan.model.source, options, on_device=plan.on_device), options=plan.options, output=plan.output
    )


def _batcher(plan: ConversionPlan, token_ids: Tensor) -> MicroBatcher:
    device = resolve_device(plan.options.device)
    return make_batcher(plan.model.skeleton, token_ids, batch_tokens=plan.batch_tokens, device=device)


@contextmanager
def _reader(plan: ConversionPlan, steps: Sequence[Step], emit: Listener) -> Iterator[TensorReader]:
    """Reads the source in the order of a pass, whose shards are downloaded ahead of it."""
    source = plan.model.source
    with (
        source.feed(steps, low_disk=plan.options.low_disk, emit=emit) as feed,
        TensorReader(source, feed=feed, emit=emit) as reader,
    ):
        yield reader


@contextmanager
def _loader(
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


def _stored_experts(plan: ConversionPlan) -> StoredExperts:
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


def run(
    plan: ConversionPlan, writer: ShardWriter, calibration: CalibrationSet | None, emit: Listener
) -> tuple[list[LayerReport], list[LayerPicture], dict[str, int]]:
    """Converts every layer.

    Args:
        plan: A final plan.
        writer: Takes the weights of the result.
        calibration: What the model runs on; ``None`` where the plan has statistics.
        emit: Called with progress and warnings.

    Returns:
        A report per MoE layer, a picture per MoE layer if the plan asks for a figure, and the peak memory in bytes.
    """
    device = resolve_device(plan.options.device)
    batcher = MicroBatcher(1, 1, device) if calibration is None else _batcher(plan, calibration.token_ids)
    stored = _stored_experts(plan)
    reducer, results = LayerReducer(plan, emit, stored), ResultWriter(plan, writer, emit, stored)

    def on_read(tensor: LogicalTensor, parts: Mapping[str, Tensor], values: Tensor) -> None:
        stored.remember(tensor, parts)
        _copy(plan, writer, tensor, parts, values)

    with ExitStack() as stack:
        reader = stack.enter_context(_reader(plan, plan.reading_order, emit))
        loader = stack.enter_context(_loader(plan, reader, batcher, on_read))
        loader.load(None)
        results.write(None, {})
        if plan.statistics is not None:
            convert_from_statistics(plan, plan.statistics, loader, reducer=reducer, writer=results, batcher=batcher)
        else:
            assert calibration is not None, "without statistics there are tokens"
            token_ids = calibration.token_ids
            path = plan.options.statistics
            statistics = None if path is None else stack.enter_context(open_statistics(path))
            merged = None
            if plan.recipe.propagates:
                merged = MergedStream(batcher, emit, compensates=plan.recipe.refits)
            observing = ObservingPass(plan, batcher, statistics, domains=calibration.domains)
            converting = ConvertingPass(plan, observing, reducer, writer=results, merged=merged)
            batch = token_ids
            if merged is not None:
                batch = merged.double(token_ids, lengths(plan.model.skeleton, token_ids))
            stream(plan.model.skeleton, loader, converting.visit, batch, batcher=batcher)
            if statistics is not None:
                describe(statistics, plan, token_ids)
        for tensor in map(plan.model.tensors.__getitem__, plan.account.unread):
            if tensor.name in plan.account.decoded:
                writer.write(tensor.name, read_logical(tensor, reader)[1])
                continue
            for part in tensor.parts.values():
                writer.write(part.name, reader.read(part))
    return reducer.reports, reducer.pictures, peak_memory(device)
