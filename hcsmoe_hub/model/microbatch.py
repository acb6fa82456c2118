"""Runs a decoder layer over the whole calibration set in micro-batches that halve themselves when memory runs out.

B sequences, S tokens each.
"""

from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import find_executable_batch_size, send_to_device
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor

from hcsmoe_hub.errors import PlanError


def select(value: Any, rows: slice, batch: int) -> Any:
    """Cuts ``rows`` out of every tensor whose first dimension is the batch, inside tuples, lists and dicts as well.

    Other objects are passed on as they are: some models hand a shared mutable object from layer to layer.
    """
    if isinstance(value, Tensor):
        return value[rows] if value.dim() > 0 and value.shape[0] == batch else value
    if type(value) in (tuple, list):
        return type(value)(select(item, rows, batch) for item in value)
    if type(value) is dict:
        return {key: select(item, rows, batch) for key, item in value.items()}
    return value


def join(parts: list[Any]) -> Any:
    """Inverse of ``select`` over all rows: concatenates tensors, inside tuples, lists and dicts as well."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts)
    if type(first) in (tuple, list):
        return type(first)(join(list(items)) for items in zip(*parts, strict=True))
    if type(first) is dict:
        return {key: join([part[key] for part in parts]) for key in first}
    return first


class MicroBatcher:
    """Runs layers on a few sequences at a time; a size that fitted one layer is tried on the next.

    Args:
        sequences: B, the number of calibration sequences.
        batch: Sequences per micro-batch to begin with.
        device: Where layers run; inputs come from the CPU and outputs go back to it.
    """

    def __init__(self, sequences: int, batch: int, device: torch.device) -> None:
        self.sequences = sequences
        self.batch = batch
        self.device = device

    def wrap(self, forward: Callable[..., Any], on_attempt: Callable[[], None]) -> Callable[..., Any]:
        """A forward of the same signature over all sequences.

        Args:
            forward: The forward of one micro-batch.
            on_attempt: Called before the first micro-batch of every attempt; discards the results of a failed one.
        """

        def forward_all(*args: Any, **kwargs: Any) -> Any:
            def attempt(batch_size: int) -> Any:
                on_attempt()
                starts = range(0, self.sequences, batch_size)
                return join([self._run(forward, args, kwargs, slice(start, start + batch_size)) for start in starts])

            try:
                return attempt(self.batch)
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
            return find_executable_batch_size(
                attempt, starting_batch_size=self._halve(), reduce_batch_size_fn=self._halve
            )()

        return forward_all

    def _run(self, forward: Callable[..., Any], args: Any, kwargs: Any, rows: slice) -> Any:
        if rows.stop - rows.start < self.sequences:
            args, kwargs = select(args, rows, self.sequences), select(kwargs, rows, self.sequences)
        if self.device.type == "cpu":
            return forward(*args, **kwargs)
        args, kwargs = send_to_device(args, self.device), send_to_device(kwargs, self.device)
        return send_to_device(forward(*args, **kwargs), torch.device("cpu"))

    def _halve(self) -> int:
        self.batch //= 2
        if self.batch == 0:
            raise PlanError(
                "one calibration sequence does not fit into memory along with one decoder layer.",
                hint="use a smaller `sequence_length`, or `device='cpu'`",
            )
        return self.batch
