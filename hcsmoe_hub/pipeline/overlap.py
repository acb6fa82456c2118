"""What goes on at the same time: the next layer is read, this one is computed, and the last one is written.

Memory bounds it, and this is what the plan counts: two layers, and the experts of one layer of the result. While a
layer runs, the next one is loaded and the experts of the last one wait for the disk. Before experts are merged, the
last ones have been written. Loading goes on meanwhile if it takes no more than the layer itself; see
``LayerLoader.settle``.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from hcsmoe_hub.checkpoint.background_writer import BackgroundWriter
from hcsmoe_hub.checkpoint.formats import LogicalTensor
from hcsmoe_hub.checkpoint.writer import ShardWriter
from hcsmoe_hub.planning.conversion_plan import ConversionPlan

# Small tensors need not wait for each other.
LEAST_WAITING_BYTES = 16_000_000


def background_writer(plan: ConversionPlan, shards: ShardWriter, device: torch.device) -> BackgroundWriter:
    """A writer on a thread of its own, for a ``with`` block.

    Args:
        plan: What is written.
        shards: Takes the weights of the result.
        device: Where they are computed.
    """
    experts = (sum(plan.state[tensor.name].numel() for tensor in block.experts) for block in plan.model.blocks)
    most_bytes = max(plan.model.dtype.itemsize * max(experts), LEAST_WAITING_BYTES)
    return BackgroundWriter(shards, device, most_bytes=most_bytes)


def copy_unchanged(
    plan: ConversionPlan,
    writer: BackgroundWriter,
    tensor: LogicalTensor,
    parts: Mapping[str, Tensor],
    values: Tensor,
) -> None:
    """Writes a tensor that does not change as it is read: its bytes, or its numbers in the dtype of the model.

    Args:
        plan: What is written.
        writer: Takes it.
        tensor: What was read.
        parts: Its parts as stored, by role.
        values: Its values.
    """
    if tensor.name in plan.account.copied:
        for role, part in parts.items():
            writer.write(tensor.parts[role].name, part)
    elif tensor.name in plan.account.decoded:
        writer.write(tensor.name, values)


class WrittenLayers:
    """Saves what a layer leaves on the writer's thread, after the tensors of the layer.

    Args:
        writer: The thread.
        shards: What it writes to.
    """

    def __init__(self, writer: BackgroundWriter, shards: ShardWriter) -> None:
        self._writer = writer
        self._shards = shards

    def after(self, task: Callable[[], None]) -> None:
        """Runs a task when everything is written that was handed over before."""
        self._writer.after(task)

    def settle(self) -> None:
        """Waits until everything is saved."""
        self._writer.settle()

    def sync(self) -> dict[str, str]:
        """Brings to the disk what was written; returns digests of new tensors by name."""
        return self._shards.sync()
