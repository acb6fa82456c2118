"""The last step of ``refit='model'``: the whole reduced model is trained on the logits of its source.

It works on a result whose shards are complete, but which has neither a config nor an index yet: whatever ends it early
leaves nothing that looks finished.
"""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from hcsmoe_hub.calibration.calibration_set import CalibrationSet
from hcsmoe_hub.checkpoint.reader import TensorReader
from hcsmoe_hub.checkpoint.source import LocalSource, Source
from hcsmoe_hub.checkpoint.tensors import INDEX_FILE
from hcsmoe_hub.checkpoint.writer import overwrite_tensor, write_json
from hcsmoe_hub.errors import CalibrationError
from hcsmoe_hub.events import Listener, Stage, StageAdvanced
from hcsmoe_hub.machine.allocator import mapping_large_tensors, return_freed_memory
from hcsmoe_hub.machine.device import compute_dtype, resolve_device
from hcsmoe_hub.methods.distil.text import LEAST_SEQUENCES, make_pieces
from hcsmoe_hub.methods.distil.training import Model, Pair, Trained, rates_for, step_count, step_pieces, train
from hcsmoe_hub.model.layer_loader import LayerLoader
from hcsmoe_hub.model.source_model import SourceModel, read_model
from hcsmoe_hub.model.trained import trained_parameters
from hcsmoe_hub.model.transformers_seam import sequential_loading
from hcsmoe_hub.pipeline.held_out import HeldOut, why_not_measured
from hcsmoe_hub.planning.conversion_plan import ConversionPlan
from hcsmoe_hub.report import DomainDivergence, ModelRefitReport


def check_text(plan: ConversionPlan, calibration: CalibrationSet) -> None:
    """Checks that some sequences can be trained on while others judge.

    Raises:
        CalibrationError: If there is a single one.
    """
    found = len(calibration.token_ids)
    if found < LEAST_SEQUENCES:
        raise CalibrationError(
            "`refit='model'` trains on some calibration sequences and judges by others, but "
            f"{plan.calibration.dataset} fills only {found}.",
            hint="use more text, or a shorter `sequence_length`",
        )


def training_steps(calibration: CalibrationSet) -> int:
    """Steps that the training will make."""
    return step_count(*make_pieces(calibration.token_ids, calibration.domains).fitted_NL.shape)


def refit_model(
    plan: ConversionPlan, calibration: CalibrationSet, emit: Listener
) -> tuple[ModelRefitReport, HeldOut | None]:
    """Trains routers, experts and norms of a written result, and writes them again where that helped.

    Args:
        plan: The conversion; its shards are complete in its output folder.
        calibration: Text to train on and to judge by; the sequences that measure the result are not looked at.
        emit: Called with downloads and steps.

    Returns:
        What it did, and held-out sequences after their way through both models if the plan measures on some.

    Raises:
        HcsmoeError: If the source or the result cannot be read, or the disk fails.
    """
    start, device = time.perf_counter(), resolve_device(plan.options.device)
    with _as_checkpoint(plan) as view:
        result, stored = _load(view, device, emit)
    source, _ = _load(plan.model.source, device, emit)
    pieces = make_pieces(calibration.token_ids, calibration.domains)
    trained = _trained(result, stored)
    pair, steps = Pair(student=_logits(result, device), teacher=_logits(source, device)), 0
    for rate in rates_for(plan.kept_share):
        done = train(
            pair,
            list(trained.values()),
            pieces,
            rate=rate,
            seed=plan.recipe.seed,
            on_step=lambda: emit(StageAdvanced(Stage.REFIT)),
        )
        steps += done.steps
        if done.kept:
            break
    if done.kept:
        _write(plan, result, dict(zip(trained, done.values, strict=True)))
    held_out = None
    if why_not_measured(plan, calibration) is None:
        with torch.no_grad():
            for tensor, values in zip(trained.values(), done.values, strict=True):
                tensor.parameter.copy_(values)
        held_out = _held_out(source, result, calibration, device)
    del source, result, pair
    return_freed_memory()
    fitted_NL = pieces.fitted_NL
    report = ModelRefitReport(
        is_kept=done.kept > 0,
        steps=done.kept,
        rate=rate,
        fitted_tokens=fitted_NL.numel(),
        visited_tokens=steps * step_pieces(*fitted_NL.shape) * fitted_NL.shape[1],
        held_out_tokens=sum(ids_NL.numel() for ids_NL in pieces.judged.values()),
        domains=[
            DomainDivergence(domain=domain, kl_before=done.before[domain], kl_after=done.after[domain])
            for domain in pieces.judged
        ],
        seconds=round(time.perf_counter() - start, 3),
    )
    return report, held_out


def _held_out(source: SourceModel, result: SourceModel, calibration: CalibrationSet, device: torch.device) -> HeldOut:
    """Takes the held-out sequences through both models."""

    def hidden(model: SourceModel) -> Tensor:
        decoder = model.skeleton.decoder
        rows = [
            decoder(input_ids=ids_1S.to(device), use_cache=False).last_hidden_state.cpu()
            for ids_1S in calibration.measured_ids.split(1)
        ]
        return torch.cat(rows)

    with torch.no_grad():
        return HeldOut(
            skeleton=source.skeleton,
            device=device,
            ids_MS=calibration.measured_ids,
            domains=calibration.measured_domains,
            source_MSH=hidden(source),
            result_MSH=hidden(result),
        )


@contextmanager
def _as_checkpoint(plan: ConversionPlan) -> Iterator[Source]:
    """The unfinished result as a checkpoint: a config and an index elsewhere, next to links to its shards."""
    with TemporaryDirectory(prefix="hcsmoe-") as name:
        folder = Path(name)
        for shard in plan.shards.files:
            (folder / shard).symlink_to((plan.output / shard).resolve())
        write_json(folder / "config.json", plan.config)
        if len(plan.shards.files) > 1:
            weight_map = {name: tensor.shard for name, tensor in plan.shards.tensors.items()}
            (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), "utf-8")
        yield LocalSource(folder)


def _load(source: Source, device: torch.device, emit: Listener) -> tuple[SourceModel, dict[str, Tensor]]:
    """A model with all of its weights in memory, but for what text does not run through.

    Returns:
        The model, and of what can be trained the tensors as they are stored, by parameter name.
    """
    model = read_model(source, with_mtp=False, compute=compute_dtype(device))
    skeleton, stored = model.skeleton, dict[str, Tensor]()
    kept = {tensor.name for block in model.decoder_blocks for tensor in block.experts}
    kept = set(trained_parameters(model)) - kept
    with mapping_large_tensors(), sequential_loading(), TensorReader(source, emit=emit) as reader:
        loader = LayerLoader(skeleton, model.placement, reader, device=device, kept=kept)
        try:
            for layer in (None, *range(len(skeleton.layers))):
                stored |= loader.load(layer)
        finally:
            loader.close()
    skeleton.module.tie_weights()
    for part in (skeleton.decoder, skeleton.module.get_output_embeddings()):
        nn.Module.to(part, device)
        if skeleton.dtype != torch.bfloat16:
            # Gradients in float16 would overflow, and dequantised weights arrive in bfloat16.
            nn.Module.to(part, torch.float32)
    return model, stored


def _trained(result: SourceModel, stored: Mapping[str, Tensor]) -> dict[str, Trained]:
    """The parameters that are trained, by name, each with its values as they are stored."""
    parameters = dict(result.skeleton.module.named_parameters())
    dtypes = {
        target: result.tensors[name].dtype for group in result.groups.values() for name, target in group.targets.items()
    }
    trained = {}
    for name in trained_parameters(result):
        values = stored.get(name, parameters[name].detach()).to("cpu", dtypes[name], copy=True)
        parameters[name].requires_grad_(True)
        trained[name] = Trained(parameter=parameters[name], start=values)
    return trained


def _logits(model: SourceModel, device: torch.device) -> Model:
    module = model.skeleton.module

    def run(ids_BL: Tensor) -> Tensor:
        logits: Tensor = module(input_ids=ids_BL.to(device), use_cache=False).logits
        return logits

    return run


def _write(plan: ConversionPlan, result: SourceModel, values: Mapping[str, Tensor]) -> None:
    """Writes parameters over those in the shards of the result."""
    skeleton, planned = result.skeleton, plan.shards.tensors
    for layer, group in result.groups.items():
        own = {name: value for name, value in values.items() if skeleton.layer_of(name) == layer}
        if own:
            for name, tensor in skeleton.to_stored(own, group).items():
                overwrite_tensor(plan.output, planned[name], tensor.to(planned[name].dtype))
