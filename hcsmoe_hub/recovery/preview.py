"""What a recovery would train, and the memory and disk space that it needs; from configs and headers alone."""

from dataclasses import dataclass
from pathlib import Path

from hcsmoe_hub.calibration.plan import CalibrationPlan
from hcsmoe_hub.events import EventLog, ignore
from hcsmoe_hub.hub.open import open_source
from hcsmoe_hub.machine.device import resolve_device
from hcsmoe_hub.model.source_model import SourceModel
from hcsmoe_hub.planning.room import sentence
from hcsmoe_hub.recovery.models import open_models, precision
from hcsmoe_hub.recovery.options import RecoverOptions
from hcsmoe_hub.recovery.place import check_output, output_folder
from hcsmoe_hub.recovery.room import (
    RecoveryDisk,
    disk_needs,
    disk_shortages,
    logit_length,
    steps_of,
    trained_of,
)
from hcsmoe_hub.recovery.text import plan_text, step_sequences

# Bytes of a number in float32, which trained tensors, their gradients and both moments of Adam are in.
_FLOAT = 4
_MOMENTS = 2
# Tensors of the size of the logits that a step has at once: of both models, their softened logarithms, a gradient.
_LOGITS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryMemory:
    """Bytes that each process needs on its device, but for what the layers compute.

    Attributes:
        weights: Of the result; what is trained in float32.
        gradients: Of what is trained.
        optimizer: Both moments of Adam.
        teacher: Of the teacher; 0 where its logits are read from the disk.
        logits: Of the next-token distributions of a batch.
    """

    weights: int
    gradients: int
    optimizer: int
    teacher: int
    logits: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.gradients + self.optimizer + self.teacher + self.logits


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryPreview:
    """A recovery before any weight is read.

    Attributes:
        result: What is trained.
        teacher: What it learns from.
        output: Folder to write.
        trained: Numbers that are trained, by what they are: ``router``, ``experts``, ``norms``, or ``lora``.
        parameters: Parameters of the result.
        text: The text; its number of sequences is the most that are read.
        steps: Most steps; ``None`` where only the time ends the training.
        step_tokens: Tokens of a step.
        memory: What it needs.
        disk: What it writes.
        device: Where it runs.
        dtype: What it computes in.
        warnings: What the recovery would warn about.
    """

    result: str
    teacher: str
    output: Path
    trained: dict[str, int]
    parameters: int
    text: CalibrationPlan
    steps: int | None
    step_tokens: int
    memory: RecoveryMemory
    disk: RecoveryDisk
    device: str
    dtype: str
    warnings: list[str]


def preview(result: str | Path, options: RecoverOptions, *, token: str | None = None) -> RecoveryPreview:
    """Describes a recovery without reading weights or text.

    Args:
        result: A result of ``hcsmoe convert``: local folder or Hub repository.
        options: What to train it on.
        token: Hub token; ``None`` uses the stored login.

    Raises:
        HcsmoeError: What a recovery would be refused with, as far as configs and headers show it.
    """
    log, output = EventLog(ignore), output_folder(result, options)
    check_output(output, options)
    student, teacher = (open_source(str(source), token=token) for source in (result, options.teacher))
    opened = open_models(student, teacher, log.emit)
    device = resolve_device(options.device)
    compute = precision(options.dtype, device)
    text = plan_text(opened.result, options)
    # LoRA adds its own parameters to the model.
    parameters, stored = opened.result.parameters, _loaded(opened.result)
    trained = trained_of(opened.result, options)
    count, vocab_size = trained.count, opened.result.skeleton.text_config.vocab_size
    frozen = stored if options.is_lora else stored - count
    held = options.teacher_logits is not None
    batch = options.batch_size * logit_length(text)
    disk = disk_needs(opened, options, text, trained)
    shortages = [sentence(shortage) for shortage in disk_shortages(opened, options, output, disk)]
    return RecoveryPreview(
        result=opened.result.source.label,
        teacher=opened.teacher.source.label,
        output=output,
        trained=trained.numbers,
        parameters=parameters,
        text=text,
        steps=steps_of(options, text),
        step_tokens=step_sequences(options) * text.sequence_length,
        memory=RecoveryMemory(
            weights=frozen * compute.itemsize + count * _FLOAT,
            gradients=count * _FLOAT,
            optimizer=count * _FLOAT * _MOMENTS,
            teacher=0 if held else _loaded(opened.teacher) * compute.itemsize,
            logits=_LOGITS * batch * vocab_size * _FLOAT,
        ),
        disk=disk,
        device=str(device),
        dtype=str(compute).removeprefix("torch."),
        warnings=[*log.warnings, *shortages],
    )


def _loaded(model: SourceModel) -> int:
    """Parameters that text runs through, shared ones counted once."""
    skeleton = model.skeleton
    left_out = skeleton.module.all_tied_weights_keys.keys() | skeleton.aside
    return sum(tensor.numel() for name, tensor in skeleton.state.items() if name not in left_out)
