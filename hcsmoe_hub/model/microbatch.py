"""Runs a decoder layer over the whole calibration set in micro-batches that halve themselves when memory runs out.

B sequences, S tokens each.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.machine.accelerator import HOST, is_host, release_unused
from hcsmoe_hub.machine.out_of_memory import is_out_of_memory
from hcsmoe_hub.machine.staging import Staging


@dataclass(frozen=True, slots=True, eq=False)
class Uncut:
    """A tensor that all sequences share, although its first dimension may be as long as a batch of them."""

    tensor: Tensor


def select(value: Any, rows: slice, batch: int) -> Any:
    """Cuts ``rows`` out of every tensor whose first dimension is the batch, inside tuples, lists and dicts as well.

    A tensor that is not cut, but is as long as what is cut, comes back as ``Uncut``: nobody could tell it from the
    others any more. Other objects are passed on as they are: some models hand a shared mutable object from layer to
    layer.
    """
    if isinstance(value, Tensor):
        if value.dim() > 0 and value.shape[0] == batch:
            return value[rows]
        count = len(range(*rows.indices(batch)))
        # A batch of one is never cut again.
        is_alike = count > 1 and value.dim() > 0 and value.shape[0] == count
        return Uncut(value) if is_alike else value
    if type(value) in (tuple, list):
        return type(value)(select(item, rows, batch) for item in value)
    if type(value) is dict:
        return {key: select(item, rows, batch) for key, item in value.items()}
    return value


def bare(value: Any) -> Any:
    """The same with plain tensors in place of ``Uncut`` ones."""
    if isinstance(value, Uncut):
        return value.tensor
    if type(value) in (tuple, list):
        return type(value)(map(bare, value))
    if type(value) is dict:
        return {key: bare(item) for key, item in value.items()}
    return value


class MicroBatcher:
    """Runs layers on a few sequences at a time; a size that fitted one layer is tried on the next.

    Args:
        sequences: B, the number of calibration sequences.
        batch: Sequences per micro-batch to begin with.
        device: Where layers run.
        home: Where everything is kept that belongs to all sequences: the device, until its memory runs out, or the
            host; by default the device.

    Attributes:
        home: Where it is kept from now on.
    """

    def __init__(self, sequences: int, batch: int, device: torch.device, *, home: torch.device | None = None) -> None:
        self.sequences = sequences
        self.batch = batch
        self.device = device
        self.home = device if home is None else home
        self._first = batch
        self._staging = Staging(device)

    def sized(self, sequences: int, batch: int) -> "MicroBatcher":
        """One for another number of sequences on the same device."""
        return MicroBatcher(sequences, batch, self.device, home=self.home)

    def wrap(self, forward: Callable[..., Any], on_attempt: Callable[[], None]) -> Callable[..., Any]:
        """A forward of the same signature over all sequences.

        Args:
            forward: The forward of one micro-batch.
            on_attempt: Called before the first micro-batch of every attempt; discards the results of a failed one.
        """

        def forward_all(*args: Any, **kwargs: Any) -> Any:
            while True:
                on_attempt()
                try:
                    return self._run_all(forward, args, kwargs)
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                self._make_room()

        return forward_all

    def keep(self, values: Any) -> Any:
        """Tensors where they are kept, inside tuples, lists and dicts; call ``settle`` before the host reads them."""
        if is_host(self.device):
            return values
        if isinstance(values, Tensor):
            return self._staging.bring(values, self.home)
        if type(values) in (tuple, list):
            return type(values)(map(self.keep, values))
        if type(values) is dict:
            return {key: self.keep(value) for key, value in values.items()}
        return values if self.home == self.device else send_to_device(values, self.home)

    def settle(self) -> None:
        """Waits until what is kept has arrived."""
        self._staging.settle()

    def _run_all(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self.home == self.device:
            # Once for all micro-batches.
            args, kwargs = self._staging.receive(self._staging.send((args, kwargs)))
        starts = range(0, self.sequences, self.batch)
        cuts = [slice(start, min(start + self.batch, self.sequences)) for start in starts]
        outputs, arriving = None, self._staging.send(self._cut(args, kwargs, cuts[0]))
        for number, rows in enumerate(cuts):
            some_args, some_kwargs = self._staging.receive(arriving)
            if number + 1 < len(cuts):
                arriving = self._staging.send(self._cut(args, kwargs, cuts[number + 1]))
            outputs = self._put(outputs, forward(*some_args, **some_kwargs), rows)
        self.settle()
        return outputs

    def _cut(self, args: Any, kwargs: Any, rows: slice) -> tuple[Any, Any]:
        """The inputs of one micro-batch."""
        if rows.stop - rows.start == self.sequences:
            return bare(args), bare(kwargs)
        return bare(select(args, rows, self.sequences)), bare(select(kwargs, rows, self.sequences))

    def _put(self, outputs: Any, part: Any, rows: slice) -> Any:
        """Puts what one micro-batch returns among what all return, for which memory is taken once.

        Args:
            outputs: Those of all sequences; ``None`` before the first micro-batch.
            part: Those of one micro-batch.
            rows: Its sequences.
        """
        if isinstance(part, Tensor):
            return self._put_tensor(outputs, part, rows)
        if type(part) in (tuple, list):
            found = [None] * len(part) if outputs is None else outputs
            return type(part)(self._put(each, item, rows) for each, item in zip(found, part, strict=True))
        if type(part) is dict:
            return {key: self._put(outputs and outputs[key], item, rows) for key, item in part.items()}
        return part

    def _put_tensor(self, outputs: Tensor | None, part: Tensor, rows: slice) -> Tensor:
        number = rows.stop - rows.start
        if number == self.sequences:
            return self._staging.bring(part, self.home)
        # Logits of a router, say, have an entry per token.
        entries = part.shape[0] // number
        if outputs is None:
            outputs = self._staging.empty((entries * self.sequences, *part.shape[1:]), part.dtype, self.home)
        self._staging.copy(outputs[rows.start * entries : rows.stop * entries], part)
        return outputs

    def _make_room(self) -> None:
        """Halves micro-batches; where one sequence is too much, keeps what belongs to all of them on the host.

        Raises:
            PlanError: If neither is possible.
        """
        self.batch //= 2
        if self.batch == 0 and not is_host(self.home):
            # It was the whole set that left no room.
            self.home, self.batch = HOST, self._first
        if self.batch == 0:
            raise PlanError(
                "one calibration sequence does not fit into memory along with one decoder layer.",
                hint="use a smaller `sequence_length`, or `device='cpu'`",
            )
        release_unused(self.device)
