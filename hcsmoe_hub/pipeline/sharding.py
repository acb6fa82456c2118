"""How the ranks of a conversion divide its work: each has a block of the sequences, and writes some of the layers.

B calibration sequences, M held-out ones, of S tokens each, H hidden size.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from hcsmoe_hub.calibration.calibration_set import CalibrationSet
from hcsmoe_hub.checkpoint.durable import INCOMPLETE
from hcsmoe_hub.errors import CalibrationError, OutputError, PlanError
from hcsmoe_hub.machine import ranks
from hcsmoe_hub.model.microbatch import bare, select
from hcsmoe_hub.observation.statistics import Call, count_tokens, pick_tokens
from hcsmoe_hub.observation.statistics_writer import StatisticsWriter, holds, open_statistics
from hcsmoe_hub.observation.stored_states import LayerStates
from hcsmoe_hub.pipeline.layer_steps import LayerSteps
from hcsmoe_hub.planning.conversion_plan import ConversionPlan

# Folders on a network show new files late.
PROBE_SECONDS = 10.0


def check_shareable(plan: ConversionPlan) -> None:
    """Checks that several ranks can carry out a plan together; every rank comes to the same answer.

    Raises:
        PlanError: If one of its options needs a single process.
    """
    if ranks.size() == 1:
        return
    count, options = ranks.size(), plan.options
    single = "start it without a launcher"
    if plan.trains_model:
        raise PlanError(
            f"`refit='model'` trains the whole model in one process, but {count} ranks were started.",
            hint=f"use `refit='blocks'`, or {single}",
        )
    if options.low_disk:
        raise PlanError(
            f"`low_disk` deletes what was read, but each of {count} ranks reads at its own pace.",
            hint=f"drop `low_disk`, or {single}",
        )
    if ":" in options.device:
        raise PlanError(
            f"`device='{options.device}'` is one device, but {count} ranks were started.",
            hint="use `device='cuda'`: every rank takes a device of its own",
        )


def check_same_plan(plan: ConversionPlan) -> None:
    """Checks that all ranks are about to do the same.

    Raises:
        PlanError: If they were started with other options, or see other checkpoints or versions.
    """
    found = ranks.every(_described(plan))
    differing = ranks.differing(found)
    if differing is not None:
        rank, name = differing
        raise PlanError(
            f"rank {rank} has another {name} than rank 0: {found[rank][name]} instead of {found[0][name]}.",
            hint="start all ranks with the same command, on machines with the same versions",
            option=name if name in {field.name for field in fields(plan.options)} else None,
        )


def _described(plan: ConversionPlan) -> dict[str, str]:
    """Everything that must be the same, each as a short text."""
    model = plan.model
    stored = sorted((tensor.name, str(tensor.dtype), tensor.shape) for tensor in model.source.tensors.values())
    return {
        "source": model.source.label,
        **{field.name: str(getattr(plan.options, field.name)) for field in fields(plan.options)},
        "output": str(plan.output),
        "set of stored tensors": _digest(stored),
        "config": _digest(dict(model.source.config)),
        "recipe": _digest(plan.recipe.as_dict()),
        "set of written tensors": _digest([sorted(plan.shards.tensors), plan.config]),
        "number of experts": str(plan.experts_by_layer),
        "version of torch": torch.__version__,
    }


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:12]


def check_shared_folder(folder: Path) -> None:
    """Checks that all ranks write to the same folder: the first one leaves a file there, and the others look for it.

    Raises:
        OutputError: If one does not find it.
    """
    if ranks.size() == 1:
        return
    probe = folder / f"probe-{ranks.from_first(uuid4().hex)}{INCOMPLETE}"
    ranks.alike(lambda: probe.touch() if ranks.is_first() else None)
    missing = [rank for rank, is_there in enumerate(ranks.every(_appears(probe))) if not is_there]
    if ranks.is_first():
        probe.unlink()
    if missing:
        raise OutputError(
            f"rank {missing[0]} does not see what rank 0 writes to {folder}, so it is not a folder that they share.",
            hint="choose a folder with `output` that all machines have mounted",
        )


def _appears(file: Path) -> bool:
    deadline = time.monotonic() + PROBE_SECONDS
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def writes(layer: int | None) -> bool:
    """Whether this rank writes a layer: ranks take turns, so that what belongs together is from one of them.

    Args:
        layer: Its index; ``None`` for what is outside the layers.
    """
    return (0 if layer is None else layer) % ranks.size() == ranks.number()


@contextmanager
def statistics_writer(plan: ConversionPlan, path: Path | None, steps: LayerSteps) -> Iterator[StatisticsWriter | None]:
    """Writes a statistics file: the one that the options name on the first rank alone, one of its own on every rank.

    Args:
        plan: The conversion.
        path: The file; ``None`` if none is written.
        steps: The layers of the pass that writes it; they begin anew if what an interrupted run has written is lost.
    """
    is_written = path is not None and (path != plan.options.statistics or ranks.is_first())
    if not ranks.all_agree(path is None or not is_written or not steps.marks or holds(path, steps.marks)):
        steps.forget()
    if path is None or not is_written:
        yield None
        return
    with open_statistics(path, marks=steps.marks, is_kept=steps.goes_on) as statistics:
        steps.statistics = statistics
        yield statistics


def own_sequences(calibration: CalibrationSet) -> CalibrationSet:
    """This rank's block of the sequences; the domains of those to observe on stay those of all.

    Raises:
        CalibrationError: If there are fewer sequences than ranks.
    """
    count = ranks.size()
    if count == 1:
        return calibration
    sequences = len(calibration.token_ids)
    if sequences < count:
        raise CalibrationError(
            f"there are {sequences} calibration sequences for {count} ranks, and each needs one at least.",
            hint="use more `samples`, or start fewer ranks",
        )
    own, measured = ranks.block(sequences), ranks.block(len(calibration.measured_ids))
    return replace(
        calibration,
        token_ids=calibration.token_ids[own],
        measured_ids=calibration.measured_ids[measured],
        measured_domains=calibration.measured_domains[measured],
    )


def own_states(states: LayerStates) -> LayerStates:
    """What passed a layer in this rank's block of the sequences, from what passed it in all of them."""
    if ranks.size() == 1:
        return states
    sequences = len(states.output_BSH)
    own, calls, start = ranks.block(sequences), list[Call](), 0
    batches = [_rows(call) for call in states.calls]
    # Some blocks are given tokens without a dimension of sequences.
    per_sequence = sum(batches) // sequences
    first, end = own.start * per_sequence, own.stop * per_sequence
    for call, batch in zip(states.calls, batches, strict=True):
        rows = slice(max(first - start, 0), min(end - start, batch))
        if rows.start < rows.stop:
            calls.append(_cut(call, rows, batch))
        start += batch
    return LayerStates(calls=calls, output_BSH=states.output_BSH[own])


def all_states(states: LayerStates, *, is_whole_layer: bool) -> LayerStates:
    """What passed a layer in all sequences, from what passed it in those of each rank.

    Args:
        states: Of this rank.
        is_whole_layer: Whether its block is a whole layer, which has all sequences in one call.
    """
    if ranks.size() == 1:
        return states
    calls = [Call(*send_to_device((call.args, dict(call.kwargs)), "cpu")) for call in states.calls]
    found = ranks.every(LayerStates(calls=calls, output_BSH=states.output_BSH.cpu()))
    calls = [call for each in found for call in each.calls]
    if is_whole_layer:
        calls = [_joined_calls(calls)]
    return LayerStates(calls=calls, output_BSH=torch.cat([each.output_BSH for each in found]))


def own_tokens(call: Call) -> Call:
    """This rank's block of the tokens of a sample, which is one sequence."""
    if ranks.size() == 1:
        return call
    own = ranks.block(count_tokens([call]))
    return pick_tokens([call], torch.arange(own.start, own.stop))


def all_rows(rows: Tensor | None) -> Tensor | None:
    """Hidden states ``[M, S, H]`` of all held-out sequences on the host, from those of this rank.

    Args:
        rows: Its own; ``None`` where it has no held-out sequences.
    """
    found = [part for part in ranks.every(None if rows is None else rows.cpu()) if part is not None]
    return torch.cat(found) if found else None


def all_sequences(rows: Tensor) -> Tensor:
    """Token ids or hidden states of all held-out sequences, from those of this rank; a rank may have none."""
    return torch.cat(ranks.every(rows))


def _rows(call: Call) -> int:
    values = [value for value in (*call.args, *call.kwargs.values()) if isinstance(value, Tensor)]
    return len(values[0])


def _cut(call: Call, rows: slice, batch: int) -> Call:
    if rows == slice(0, batch):
        return call
    return Call(bare(select(call.args, rows, batch)), bare(select(dict(call.kwargs), rows, batch)))


def _joined_calls(calls: Sequence[Call]) -> Call:
    """One call from those of all ranks; what does not count sequences is the same in each."""
    batches = [_rows(call) for call in calls]

    def joined(values: Sequence[Any]) -> Any:
        is_batched = all(
            isinstance(value, Tensor) and value.dim() and len(value) == batch
            for value, batch in zip(values, batches, strict=True)
        )
        return torch.cat(list(values)) if is_batched else values[0]

    return Call(
        tuple(joined([call.args[number] for call in calls]) for number in range(len(calls[0].args))),
        {name: joined([call.kwargs[name] for call in calls]) for name in calls[0].kwargs},
    )
