"""What a recovery trains and writes, in numbers and bytes, and whether its disks have room for it."""

import math
from dataclasses import dataclass
from pathlib import Path

from hcsmoe_hub.calibration.plan import CalibrationPlan
from hcsmoe_hub.checkpoint.pieces import download_bytes
from hcsmoe_hub.checkpoint.unfinished import progress, staging
from hcsmoe_hub.errors import OutputError
from hcsmoe_hub.model.source_model import SourceModel, read_model
from hcsmoe_hub.model.trained import trained_parameters
from hcsmoe_hub.pipeline.whole_model import stored_dtypes
from hcsmoe_hub.planning.disk_space import Load, existing_part, lacking, shard_bytes, stored_bytes
from hcsmoe_hub.recovery.logits_file import LogitsShape
from hcsmoe_hub.recovery.lora import add_lora
from hcsmoe_hub.recovery.models import Opened
from hcsmoe_hub.recovery.options import DEFAULT_PASSES, RecoverOptions, Train
from hcsmoe_hub.recovery.states import KEPT_CHECKPOINTS
from hcsmoe_hub.recovery.text import plan_text, step_sequences

# Bytes of a trained number in a checkpoint, in float32: itself, and both moments of Adam.
_STATE_BYTES = 3 * 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What is trained.

    Attributes:
        numbers: How many numbers, by what they are: ``router``, ``experts``, ``norms``, or ``lora``.
        stored: Bytes of the tensors that change, as the result stores them.
    """

    numbers: dict[str, int]
    stored: int

    @property
    def count(self) -> int:
        """Numbers that are trained."""
        return sum(self.numbers.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryDisk:
    """Bytes that a recovery needs on the disk, at most.

    Attributes:
        download: Of weights that are not on this machine yet, those of the result and of the teacher.
        result: Of the shards of the recovered result.
        states: Of what an interrupted recovery would go on from.
        logits: Of the teacher's logits; 0 if they are not kept.
    """

    download: int
    result: int
    states: int
    logits: int


def trained_of(model: SourceModel, options: RecoverOptions) -> Trained:
    """Counts what is trained of a model without weights, to which LoRA adds its own parameters."""
    dtypes = stored_dtypes(model)
    sizes = {name: parameter.numel() for name, parameter in model.skeleton.module.named_parameters()}
    if options.is_lora:
        adapters = add_lora(model, rank=options.rank or 0, seed=options.seed)
        changing = [adapter.tensor for adapter in adapters]
        factors = [factor for adapter in adapters for factor in adapter.factors.values()]
        numbers = {Train.LORA.value: sum(factor.numel() for factor in factors)}
    else:
        names = {
            part.value: trained_parameters(
                model, routers=part is Train.ROUTER, experts=part is Train.EXPERTS, norms=part is Train.NORMS
            )
            for part in options.train
        }
        changing = [name for part in names.values() for name in part]
        numbers = {part: sum(sizes[name] for name in found) for part, found in names.items()}
    return Trained(numbers=numbers, stored=sum(sizes[name] * dtypes[name].itemsize for name in changing))


def steps_of(options: RecoverOptions, text: CalibrationPlan) -> int | None:
    """Most steps of a training; ``None`` where only the time ends it."""
    if options.max_steps is not None or options.max_minutes is not None:
        return options.max_steps
    fitted = math.floor(text.sequences * (1 - options.held_out))
    return max(1, DEFAULT_PASSES * fitted // step_sequences(options))


def logit_length(text: CalibrationPlan) -> int:
    """Logits of every sequence; behind an encoder at least those of half of it, until text or pairs have been read."""
    length, labels = text.sequence_length, text.sequence_length - text.source_length
    return labels if text.is_split or text.is_token_ids else max(labels, length // 2)


def disk_needs(opened: Opened, options: RecoverOptions, text: CalibrationPlan, trained: Trained) -> RecoveryDisk:
    """Counts what a recovery needs on the disk, from headers alone."""
    vocab_size, steps = opened.result.skeleton.text_config.vocab_size, steps_of(options, text)
    shape = LogitsShape(length=logit_length(text), count=min(options.top_logits, vocab_size), vocab_size=vocab_size)
    # An old state is removed once a newer one is complete.
    states = KEPT_CHECKPOINTS + 1
    if steps is not None:
        states = min(states, math.ceil(steps / options.evaluate_every))
    return RecoveryDisk(
        download=_missing(opened.result) + _missing(opened.teacher),
        result=_shards(opened.result),
        states=states * (trained.count * _STATE_BYTES + trained.stored),
        logits=0 if options.teacher_logits is None else text.sequences * shape.bytes,
    )


def disk_shortages(opened: Opened, options: RecoverOptions, output: Path, needs: RecoveryDisk) -> list[OutputError]:
    """What is wrong if download, result, states and logits do not fit; each disk once."""
    cache = opened.result.source.cache or opened.teacher.source.cache
    loads = []
    if cache is not None and needs.download:
        loads.append(Load("the download", existing_part(cache), needs.download, "HF_HOME"))
    # What an interrupted run has written is either taken over or removed.
    place, written = existing_part(output), stored_bytes(staging(output))
    old = shard_bytes(output) if options.overwrite else 0
    loads.append(Load("the result", place, max(needs.result - written, 0), "`output`", replaced=old))
    size, saving = (
        max(needs.states - stored_bytes(progress(output)), 0),
        "" if options.is_lora else "train less with `train`",
    )
    loads.append(Load("the saved state of the training", place, size, "`output`", saving=saving))
    folder = options.teacher_logits
    if folder is not None:
        size = max(needs.logits - stored_bytes(folder), 0)
        place = existing_part(folder)
        loads.append(
            Load("the folder of logits", place, size, "`teacher_logits`", saving="keep fewer with `top_logits`")
        )
    return [OutputError(message, hint=hint) for message, hint in lacking([load for load in loads if load.size])]


def check_disk(opened: Opened, options: RecoverOptions, output: Path) -> None:
    """Checks that the disks have room for a recovery that is about to begin.

    Args:
        opened: The result and its teacher.
        options: Of the recovery.
        output: The output folder.

    Raises:
        OutputError: If one of them has not.
    """
    # LoRA adds parameters, so it gets a model of its own.
    model = read_model(opened.result.source, with_mtp=False) if options.is_lora else opened.result
    needs = disk_needs(opened, options, plan_text(opened.result, options), trained_of(model, options))
    for shortage in disk_shortages(opened, options, output, needs):
        raise shortage


def _missing(model: SourceModel) -> int:
    """Bytes of the shards that are downloaded."""
    return download_bytes(model.source.pieces([list(model.source.tensors.values())], low_disk=False))


def _shards(model: SourceModel) -> int:
    """Bytes of all shards, each of which ends with its last tensor."""
    ends = dict.fromkeys(model.source.shards, 0)
    for tensor in model.source.tensors.values():
        ends[tensor.shard] = max(ends[tensor.shard], tensor.offset + tensor.nbytes)
    return sum(ends.values())
