"""The last step of ``refit='model'``: the whole reduced model is trained on the logits of its source.

It works on a result whose shards are complete, but which has neither a config nor an index yet: whatever ends it early
leaves nothing that looks finished.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from hcsmoe_hub.calibration.calibration_set import CalibrationSet
from hcsmoe_hub.checkpoint.durable import write_json
from hcsmoe_hub.checkpoint.source import LocalSource, Source
from hcsmoe_hub.checkpoint.tensors import INDEX_FILE
from hcsmoe_hub.checkpoint.writer import overwrite_tensor
from hcsmoe_hub.errors import CalibrationError
from hcsmoe_hub.events import Listener, Stage, StageAdvanced, StageResumed
from hcsmoe_hub.machine.allocator import return_freed_memory
from hcsmoe_hub.machine.device import resolve_device
from hcsmoe_hub.methods.distil.text import LEAST_SEQUENCES, Pieces, make_pieces
from hcsmoe_hub.methods.distil.training import Pair, Trained, Trainer, rates_for, step_count, step_pieces
from hcsmoe_hub.model.source_model import SourceModel
from hcsmoe_hub.model.trained import trained_parameters
from hcsmoe_hub.pipeline.held_out import HeldOut, why_not_measured
from hcsmoe_hub.pipeline.progress import Progress
from hcsmoe_hub.pipeline.training_states import Attempt, Outcome, TrainingStates, training_identity
from hcsmoe_hub.pipeline.whole_model import load_whole, logits_of, stored_dtypes, stored_tensors
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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Models:
    """Both models in memory.

    Attributes:
        source: The source.
        result: The result, with the values that its shards hold.
        stored: What can be trained of it as it is stored, by parameter name.
        device: Where they compute.
    """

    source: SourceModel
    result: SourceModel
    stored: Mapping[str, Tensor]
    device: torch.device


def refit_model(
    plan: ConversionPlan, calibration: CalibrationSet, progress: Progress, emit: Listener
) -> tuple[ModelRefitReport, HeldOut | None]:
    """Trains routers, experts and norms of a written result, and writes them again where that helped.

    Args:
        plan: The conversion; its shards are complete in the folder of the unfinished result.
        calibration: Text to train on and to judge by; the sequences that measure the result are not looked at.
        progress: What an interrupted run has done, and where that is kept.
        emit: Called with downloads and steps.

    Returns:
        What it did, and held-out sequences after their way through both models if the plan measures on some.

    Raises:
        HcsmoeError: If the source or the result cannot be read, or the disk fails.
    """
    states, pieces = TrainingStates(progress, emit), make_pieces(calibration.token_ids, calibration.domains)
    saved, models, held_out = states.outcome(), None, None
    if saved is None:
        models = _load_both(plan, emit)
        outcome = _train(plan, models, pieces, states, emit)
    else:
        outcome, tensors = saved
        # An earlier run may have ended in the middle of this.
        _overwrite(plan, tensors)
        del saved, tensors
        emit(StageResumed(Stage.REFIT, training_steps(calibration)))
    if why_not_measured(plan, calibration) is None:
        held_out = _held_out(models or _load_both(plan, emit), calibration)
    del models
    return_freed_memory()
    fitted_NL = pieces.fitted_NL
    report = ModelRefitReport(
        is_kept=outcome.kept > 0,
        steps=outcome.kept,
        rate=outcome.rate,
        fitted_tokens=fitted_NL.numel(),
        visited_tokens=outcome.steps * step_pieces(*fitted_NL.shape) * fitted_NL.shape[1],
        held_out_tokens=sum(ids_NL.numel() for ids_NL in pieces.judged.values()),
        domains=[
            DomainDivergence(domain=domain, kl_before=outcome.before[domain], kl_after=outcome.after[domain])
            for domain in pieces.judged
        ],
        seconds=round(states.seconds, 3),
    )
    return report, held_out


def _train(plan: ConversionPlan, models: _Models, pieces: Pieces, states: TrainingStates, emit: Listener) -> Outcome:
    """Tries one rate after the other, from where an earlier run has come to, and writes the first values that help."""
    trained = _trained(models.result, models.stored)
    rates, seed = rates_for(plan.kept_share), plan.recipe.seed
    identity = training_identity(trained, pieces, seed=seed, rates=rates)
    attempt, progress = states.latest(identity)
    pair = Pair(student=logits_of(models.result, models.device), teacher=logits_of(models.source, models.device))
    while True:
        rate = rates[attempt.number]
        trainer = Trainer(pair, list(trained.values()), pieces, rate=rate, seed=seed)
        if progress is not None:
            trainer.go_on_from(progress)
            emit(StageResumed(Stage.REFIT, progress.steps))
            progress = None
        done = trainer.run(partial(_after_step, emit, states, identity, attempt, trainer))
        # Its masters and moments go before the next attempt makes its own.
        del trainer
        attempt = Attempt(number=attempt.number + 1, steps=attempt.steps + done.steps)
        if done.kept or attempt.number == len(rates):
            break
        states.begin(identity, attempt)
    outcome = Outcome(rate=rate, kept=done.kept, steps=attempt.steps, before=done.before, after=done.after)
    values = dict(zip(trained, done.values, strict=True)) if done.kept else {}
    tensors = stored_tensors(models.result, values)
    states.finish(outcome, tensors)
    _overwrite(plan, tensors)
    with torch.no_grad():
        for tensor, value in zip(trained.values(), done.values, strict=True):
            tensor.parameter.copy_(value)
    return outcome


def _after_step(emit: Listener, states: TrainingStates, identity: str, attempt: Attempt, trainer: Trainer) -> None:
    emit(StageAdvanced(Stage.REFIT))
    states.after_step(identity, attempt, trainer)


def _held_out(models: _Models, calibration: CalibrationSet) -> HeldOut:
    """Takes the held-out sequences through both models."""
    device = models.device

    def hidden(model: SourceModel) -> Tensor:
        decoder = model.skeleton.decoder
        rows = [
            decoder(input_ids=ids_1S.to(device), use_cache=False).last_hidden_state.cpu()
            for ids_1S in calibration.measured_ids.split(1)
        ]
        return torch.cat(rows)

    with torch.no_grad():
        return HeldOut(
            skeleton=models.source.skeleton,
            device=device,
            ids_MS=calibration.measured_ids,
            domains=calibration.measured_domains,
            source_MSH=hidden(models.source),
            result_MSH=hidden(models.result),
        )


@contextmanager
def _as_checkpoint(plan: ConversionPlan) -> Iterator[Source]:
    """The unfinished result as a checkpoint: a config and an index elsewhere, next to links to its shards."""
    with TemporaryDirectory(prefix="hcsmoe-") as name:
        folder = Path(name)
        for shard in plan.shards.files:
            (folder / shard).symlink_to((plan.staging / shard).resolve())
        write_json(folder / "config.json", plan.config)
        if len(plan.shards.files) > 1:
            weight_map = {name: tensor.shard for name, tensor in plan.shards.tensors.items()}
            (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), "utf-8")
        yield LocalSource(folder)


def _load_both(plan: ConversionPlan, emit: Listener) -> _Models:
    device = resolve_device(plan.options.device)
    with _as_checkpoint(plan) as view:
        result, stored = load_whole(view, device, emit)
    source, _ = load_whole(plan.model.source, device, emit)
    return _Models(source=source, result=result, stored=stored, device=device)


def _trained(result: SourceModel, stored: Mapping[str, Tensor]) -> dict[str, Trained]:
    """The parameters that are trained, by name, each with its values as they are stored."""
    parameters = dict(result.skeleton.module.named_parameters())
    dtypes = stored_dtypes(result)
    trained = {}
    for name in trained_parameters(result):
        values = stored.get(name, parameters[name].detach()).to("cpu", dtypes[name], copy=True)
        parameters[name].requires_grad_(True)
        trained[name] = Trained(parameter=parameters[name], start=values)
    return trained


def _overwrite(plan: ConversionPlan, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors over those in the shards of the result."""
    for name, tensor in tensors.items():
        overwrite_tensor(plan.staging, plan.shards.tensors[name], tensor)
