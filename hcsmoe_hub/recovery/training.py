"""Trains a result on its teacher's logits, through transformers' Trainer.

Trainer brings the loop, batches over processes, mixed precision, accumulated gradients, checkpoints, and the way back
from them. What is added here: the loss, scores on held-out text, the best weights so far, and a limit of time.

B sequences of a batch, L tokens each, T logits of each, V vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from hcsmoe_hub.events import Listener, Stage, StageAdvanced
from hcsmoe_hub.machine import ranks
from hcsmoe_hub.machine.accelerator import is_host
from hcsmoe_hub.machine.finite import are_finite
from hcsmoe_hub.machine.random_state import random_state_kept
from hcsmoe_hub.methods.distil.losses import text_loss
from hcsmoe_hub.model.sequences import model_inputs
from hcsmoe_hub.model.transformers_seam import is_computed_twice
from hcsmoe_hub.recovery.clock import Clock
from hcsmoe_hub.recovery.options import DEFAULT_PASSES, RecoverOptions
from hcsmoe_hub.recovery.scoring import Scorer
from hcsmoe_hub.recovery.states import KEPT_CHECKPOINTS, History, Saved, complete, write_tensors
from hcsmoe_hub.recovery.teacher import Teacher, divergence_from
from hcsmoe_hub.recovery.text import RecoveryText, step_sequences
from hcsmoe_hub.recovery.trained import TrainedWeights

BETAS = (0.9, 0.99)
# Far below any gradient: the size of a step must not depend on the scale of the loss.
EPSILON = 1e-12
# In place of no limit; Trainer counts steps in any case.
_UNLIMITED = 10**9
# Events of a training whose end depends on the time.
_PARTS = 100


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Job:
    """Everything that a training works with.

    Attributes:
        student: The result, on its device.
        weights: What of it is trained.
        teacher: Gives the targets.
        text: What it is trained on.
        scorer: Scores it on held-out text.
        options: Of the recovery.
        device: Where it computes.
        autocast: Dtype of matrix products; ``None`` for that of the weights.
        folder: Folder of the checkpoints.
        emit: Called with steps.
        on_saved: Called when there is something to go on from.
    """

    student: PreTrainedModel
    weights: TrainedWeights
    teacher: Teacher
    text: RecoveryText
    scorer: Scorer
    options: RecoverOptions
    device: torch.device
    autocast: torch.dtype | None
    folder: Path
    emit: Listener
    on_saved: Callable[[], None]


def make_clock(options: RecoverOptions, text: RecoveryText) -> Clock:
    """How long a training takes: the steps and minutes of the options, or two passes over the text."""
    steps = options.max_steps
    if steps is None and options.max_minutes is None:
        steps = max(1, DEFAULT_PASSES * len(text.train_NL) // step_sequences(options))
    return Clock(steps, options.max_minutes)


def event_count(clock: Clock, options: RecoverOptions) -> int:
    """Events of a training: one per step, or per hundredth of it where its end depends on the time."""
    return clock.max_steps if clock.max_steps is not None and options.max_minutes is None else _PARTS


# Trainer seeds every generator of the process.
@random_state_kept()
def train(job: Job, clock: Clock, history: History, saved: Saved | None) -> dict[str, Tensor]:
    """Trains until the steps or the time are over, or no score has improved for long.

    Args:
        job: What to train.
        clock: How long.
        history: What has come of it so far; goes on being written to.
        saved: Where an interrupted run has come to.

    Returns:
        The best tensors of the model as they are stored, by parameter name; empty if the untrained ones are.
    """
    best = {} if saved is None else saved.best()
    if history.stopped:
        return best
    trainer = _RecoveryTrainer(job, clock, history, best)
    trainer.train(resume_from_checkpoint=None if saved is None else str(saved.folder))
    history.seconds = clock.seconds
    return trainer.best


class _Sequences(Dataset[dict[str, Any]]):
    """The sequences that are trained on, with their numbers."""

    def __init__(self, ids_NL: Tensor) -> None:
        self._ids_NL = ids_NL

    def __len__(self) -> int:
        return len(self._ids_NL)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {"number": number, "ids_L": self._ids_NL[number]}


def _collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {
        "numbers": torch.tensor([row["number"] for row in rows]),
        "input_ids": torch.stack([row["ids_L"] for row in rows]),
    }


class _RecoveryTrainer(Trainer):
    def __init__(self, job: Job, clock: Clock, history: History, best: Mapping[str, Tensor]) -> None:
        self._job = job
        self._history = history
        self._clock = clock
        self.best = dict(best)
        if not is_host(job.device):
            # Trainer takes the current one.
            torch.get_device_module(job.device.type).set_device(job.device)
        optimizer = _optimizer(job)
        dataset = _Sequences(job.text.train_NL)
        super().__init__(
            model=job.student,
            args=_arguments(job, clock),
            data_collator=_collate,
            train_dataset=dataset,
            eval_dataset=dataset,
            optimizers=(optimizer, LambdaLR(optimizer, clock.schedule)),
            callbacks=[_Flow(job, clock, history)],
        )
        self.remove_callback(PrinterCallback)
        # The loss is the mean of a batch, and the model is not asked for one.
        self.model_accepts_loss_kwargs = False
        self.loss_is_scaled_for_ga = False

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Mean per token of the weighted divergence from the teacher and of the loss on the text."""
        options, text, ids_BL = self._job.options, self._job.text, inputs["input_ids"]
        _without_chance(self._job.student)
        arguments = model_inputs(self._job.student.config, ids_BL, text.source_length)
        logits_BTV = model(**arguments, use_cache=False).logits
        loss = logits_BTV.new_zeros((), dtype=torch.float32)
        if options.kd_weight:
            targets = self._job.teacher.targets(inputs["numbers"], ids_BL)
            # Gradients of a softened distribution are smaller by the square of its temperature.
            scale = options.kd_weight * options.temperature**2 / (len(ids_BL) * text.logit_length)
            loss = loss + scale * divergence_from(targets, logits_BTV, options.temperature)
        if options.text_weight:
            labels_BT = text.labels(ids_BL)
            loss = loss + options.text_weight / labels_BT.numel() * text_loss(logits_BTV, labels_BT)
        self._history.tokens += ids_BL.numel() * ranks.size()
        return (loss, None) if return_outputs else loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Scores what would be stored now, keeps it if it is the best, and ends what has not improved for long."""
        history, options = self._history, self._job.options
        with self._job.weights.as_stored():
            perplexity = self._job.scorer.perplexity()
        if perplexity < history.best:
            values = self._job.weights.values()
            # What held-out text does not reach may have overflowed unseen.
            if all(are_finite(value) for value in values.values()):
                self.best, history.kept_step = values, self.state.global_step
        # JSON has no infinity.
        shown = perplexity if isfinite(perplexity) else float(torch.finfo(torch.float64).max)
        history.points.append({"step": self.state.global_step, "perplexity": shown})
        if options.patience is not None and not history.stopped and history.scores_since_best >= options.patience:
            history.stopped = "patience"
            self.control.should_training_stop = self.control.should_save = True
        metrics = {"eval_perplexity": shown}
        # Trainer would score the same weights twice.
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes what is trained and the best tensors so far: the rest of the model is in its own shards."""
        assert output_dir is not None, "checkpoints alone are saved"
        if self.args.should_save:
            write_tensors(Path(output_dir), self._job.weights.state(), self.best)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Undoes ``save_model``."""
        saved = Saved(folder=Path(resume_from_checkpoint), history=self._history)
        self._job.weights.load_state(saved.parameters())

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        """Does nothing: the model is there already."""


def _without_chance(model: PreTrainedModel) -> None:
    """Lets a model compute what it computes in use: without dropout, noise of routers, or layers left out at random.

    Routers also give experts less room while they are trained than in use. Layers alone may know of the training: those
    that are computed twice ask for it.
    """
    for part in model.modules():
        part.training = is_computed_twice(part)


class _Flow(TrainerCallback):
    """Ends a training when its time is over, and reports its steps."""

    def __init__(self, job: Job, clock: Clock, history: History) -> None:
        self._job = job
        self._clock = clock
        self._history = history
        self._is_timed = job.options.max_minutes is not None
        self._reported = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._clock.go_on(self._history.seconds)
        self._reported = int(_PARTS * self._clock.share(state.global_step))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._clock.look()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._clock.is_over or state.global_step == self._clock.max_steps:
            self._history.stopped = "time" if self._clock.is_over else "steps"
            control.should_training_stop = control.should_evaluate = control.should_save = True
        share = int(_PARTS * self._clock.share(state.global_step))
        for _ in range(share - self._reported if self._is_timed else 1):
            perplexity = self._history.points[-1]["perplexity"]
            detail = f"step {state.global_step}, perplexity {perplexity:.4g}"
            self._job.emit(StageAdvanced(Stage.RECOVER, detail))
        self._reported = share

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._history.seconds = self._clock.seconds
        if args.should_save:
            complete(self._job.folder / f"checkpoint-{state.global_step}", self._history)
        self._job.on_saved()


def _optimizer(job: Job) -> torch.optim.Optimizer:
    """Adam, each tensor with a largest step of its own."""
    weights = job.weights
    groups = [{"params": [parameter], "lr": weights.rates[name]} for name, parameter in weights.parameters.items()]
    # One pass over the memory of an accelerator; on a CPU that gains nothing.
    return torch.optim.AdamW(groups, betas=BETAS, eps=EPSILON, weight_decay=0.0, fused=not is_host(job.device))


def _arguments(job: Job, clock: Clock) -> TrainingArguments:
    options = job.options
    arguments = TrainingArguments(
        output_dir=str(job.folder),
        max_steps=clock.max_steps or _UNLIMITED,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation,
        activation_checkpointing=options.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if options.gradient_checkpointing else None,
        max_grad_norm=0.0,
        eval_strategy="steps",
        eval_steps=options.evaluate_every,
        save_strategy="steps",
        save_steps=options.evaluate_every,
        save_total_limit=KEPT_CHECKPOINTS,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=options.seed,
        data_seed=options.seed,
        bf16=job.autocast == torch.bfloat16,
        use_cpu=is_host(job.device),
        remove_unused_columns=False,
        label_names=[],
        # Every step has as many tokens as any other.
        dataloader_drop_last=True,
        dataloader_pin_memory=not is_host(job.device),
        # Routers give no gradient to what only decides which experts run.
        ddp_find_unused_parameters=True,
    )
    # A single process uses a single accelerator.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
