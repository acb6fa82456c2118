"""What ``hcsmoe.json`` keeps of a recovery."""

from hcsmoe_hub.checkpoint.source import Source
from hcsmoe_hub.machine.versions import installed_versions, tool
from hcsmoe_hub.recovery.models import Opened
from hcsmoe_hub.recovery.options import RecoverOptions
from hcsmoe_hub.recovery.run import Outcome
from hcsmoe_hub.recovery.text import RecoveryText, step_sequences
from hcsmoe_hub.report import RecoveryRecord, RecoverySettings, RecoveryTeacher
from hcsmoe_hub.result.make_report import describe_source


def make_record(
    opened: Opened, text: RecoveryText, options: RecoverOptions, outcome: Outcome, *, changed: int
) -> RecoveryRecord:
    """Puts the record of a recovery together.

    Args:
        opened: The result and its teacher.
        text: What it was trained on.
        options: Of the recovery.
        outcome: What the training has come to.
        changed: Stored tensors that are not what they were.
    """
    history = outcome.history
    return {
        "teacher": _teacher(opened.teacher.source),
        "data": text.record(),
        "settings": _settings(options, text, outcome),
        "kept_step": history.kept_step,
        "steps": history.steps,
        "tokens": history.tokens,
        "seconds": round(history.seconds, 3),
        "stopped": history.stopped,
        "trained_parameters": outcome.trained_parameters,
        "trained_tensors": changed,
        "before": history.before,
        "after": outcome.after,
        "history": history.points,
        "tool_version": tool()["version"],
        "versions": installed_versions(),
    }


def _teacher(source: Source) -> RecoveryTeacher:
    described = describe_source(source)
    return {
        "repo_id": described.get("repo_id"),
        "path": described.get("path"),
        "revision": described["revision"],
        "fingerprint": described["fingerprint"],
    }


def _settings(options: RecoverOptions, text: RecoveryText, outcome: Outcome) -> RecoverySettings:
    return {
        "train": [str(part) for part in options.train],
        "lora_rank": options.rank,
        "temperature": options.temperature,
        "kd_weight": options.kd_weight,
        "text_weight": options.text_weight,
        "learning_rate": options.rate,
        "batch_tokens": step_sequences(options) * text.train_NL.shape[1],
        "dtype": str(outcome.dtype).removeprefix("torch."),
        "seed": options.seed,
        "held_out": options.held_out,
        "max_steps": options.max_steps,
        "max_minutes": options.max_minutes,
        "evaluate_every": options.evaluate_every,
        "patience": options.patience,
        "top_logits": None if options.teacher_logits is None else options.top_logits,
    }
