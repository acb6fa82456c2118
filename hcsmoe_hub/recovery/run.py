"""Brings a result and its teacher into memory, trains the result, and takes what is best of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hcsmoe_hub.calibration.token_ids import fingerprint
from hcsmoe_hub.errors import PlanError, VerificationError
from hcsmoe_hub.evaluation.checkpoint import Checkpoint
from hcsmoe_hub.events import EventLog, Stage, StageResumed
from hcsmoe_hub.machine import ranks
from hcsmoe_hub.machine.device import resolve_device
from hcsmoe_hub.pipeline.whole_model import logits_of, stored_tensors
from hcsmoe_hub.recovery.clock import Clock
from hcsmoe_hub.recovery.models import Opened, load_model, precision
from hcsmoe_hub.recovery.options import RecoverOptions
from hcsmoe_hub.recovery.scoring import Scorer
from hcsmoe_hub.recovery.states import History, Saved, latest
from hcsmoe_hub.recovery.teacher import LoadedTeacher, Teacher
from hcsmoe_hub.recovery.teacher_logits import LogitsStore
from hcsmoe_hub.recovery.text import RecoveryText
from hcsmoe_hub.recovery.trained import trained_weights
from hcsmoe_hub.recovery.training import Job, event_count, make_clock, train
from hcsmoe_hub.report import RecoveryPoint, RecoveryScore


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcome:
    """What a training has come to.

    Attributes:
        history: Its scores, steps and tokens.
        after: Scores of the best weights.
        tensors: The best weights by stored name, those that are trained; empty if the untrained ones are.
        trained_parameters: Numbers that were trained.
        dtype: What the models computed in.
    """

    history: History
    after: RecoveryScore
    tensors: Mapping[str, Tensor]
    trained_parameters: int
    dtype: torch.dtype


def train_result(
    opened: Opened,
    text: RecoveryText,
    options: RecoverOptions,
    folder: Path,
    log: EventLog,
    on_saved: Callable[[], None],
) -> Outcome:
    """Trains a result, from where an interrupted run has come to.

    Args:
        opened: The result and its teacher.
        text: What it is trained on.
        options: Of the recovery.
        folder: Folder of the states of the training.
        log: Called with the progress.
        on_saved: Called when there is something to go on from.

    Raises:
        VerificationError: If the untrained result predicts what is not a number.
        HcsmoeError: If weights cannot be read, or the disk fails.
    """
    device = resolve_device(options.device)
    computed = precision(options.dtype, device)
    teacher = _teacher(opened, text, options, device, log)
    model, stored = ranks.alike(lambda: load_model(opened.result.source, device, log.emit, compute=computed))
    weights = trained_weights(model, stored, options)
    del stored
    module, autocast = model.skeleton.module, torch.bfloat16 if computed == torch.bfloat16 else None
    student = logits_of(model, device, text.source_length)
    scorer = Scorer(student, module, text, batch_size=options.batch_size, device=device, autocast=autocast)
    saved = ranks.first(lambda: latest(folder))
    clock = make_clock(options, text)
    job = Job(
        student=module,
        weights=weights,
        teacher=teacher,
        text=text,
        scorer=scorer,
        options=options,
        device=device,
        autocast=autocast,
        folder=folder,
        emit=log.emit,
        on_saved=on_saved,
    )
    history, best = _train(job, clock, saved, log)
    after = history.before
    if history.kept_step:
        weights.put(best)
        after = scorer.score(teacher)
    return Outcome(
        history=history,
        after=after,
        tensors=stored_tensors(model, best),
        trained_parameters=weights.count,
        dtype=computed,
    )


def _train(job: Job, clock: Clock, saved: Saved | None, log: EventLog) -> tuple[History, Mapping[str, Tensor]]:
    with log.timed(Stage.RECOVER, event_count(clock, job.options)):
        if saved is None:
            with job.weights.as_stored():
                before = job.scorer.score(job.teacher)
            first: RecoveryPoint = {"step": 0, "perplexity": before["perplexity"]}
            history = History(text=fingerprint(job.text.sequences), before=before, points=[first])
            if before["perplexity"] == float("inf"):
                raise VerificationError(
                    "the predictions of the result on held-out text are not finite numbers.",
                    hint="run 'hcsmoe verify' on it",
                )
        else:
            history = saved.history
            if history.text != fingerprint(job.text.sequences):
                raise PlanError(
                    f"the text of {job.options.data} is not what it was when this recovery was interrupted.",
                    hint="go on with the same text, or add `restart=True` to begin anew",
                )
            log.emit(StageResumed(Stage.RECOVER, history.steps))
        best = train(job, clock, history, saved)
    return history, best


def _teacher(
    opened: Opened, text: RecoveryText, options: RecoverOptions, device: torch.device, log: EventLog
) -> Teacher:
    """The teacher in memory, or what it has said of the text before the result is loaded."""
    source = opened.teacher.source
    if options.teacher_logits is None:
        compute = precision(options.dtype, device)
        model, _ = ranks.alike(lambda: load_model(source, device, log.emit, compute=compute))
        return LoadedTeacher(logits_of(model, device, text.source_length))
    store = LogitsStore(
        folder=options.teacher_logits,
        teacher=Checkpoint(source),
        ids_NL=text.sequences,
        top=options.top_logits,
        temperature=options.temperature,
        source_length=text.source_length,
        text={"`data`": text.record()["dataset"], "`seed`": options.seed},
    )
    ranks.on_first(lambda: store.fill(device, log.emit))
    return store.open()
