"""Logits of a checkpoint for sequences of token ids, whether or not the model fits into memory.

B sequences of a batch, S tokens each, H hidden size, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hcsmoe_hub.evaluation.checkpoint import Checkpoint
from hcsmoe_hub.model.head import head
from hcsmoe_hub.model.skeleton import Skeleton


@dataclass(frozen=True, slots=True)
class Request:
    """A request for logits.

    Attributes:
        ids: Token ids of one sequence, at least one.
        start: First position whose logits are returned, along with those of all later positions.
    """

    ids: Sequence[int]
    start: int = 0


class Scorer(ABC):
    """Runs a checkpoint in float32 without gradients.

    Args:
        checkpoint: The checkpoint to run.
        batch_tokens: Tokens per batch, padding included; one sequence may be longer.

    Attributes:
        checkpoint: The checkpoint that is run.
    """

    def __init__(self, checkpoint: Checkpoint, *, batch_tokens: int) -> None:
        self.checkpoint = checkpoint
        self._batch_tokens = batch_tokens

    @abstractmethod
    def _hidden(self, ids_BS: Tensor) -> Tensor:
        """Hidden states after the decoder's last norm, ``[B, S, H]`` float32, for ids ``[B, S]`` int64."""

    @abstractmethod
    def _skeleton(self) -> Skeleton:
        """A skeleton whose head is loaded."""

    def logits(self, requests: Sequence[Request]) -> Iterator[tuple[int, Tensor]]:
        """Computes logits, shortest sequences first, in the given order among equal lengths.

        Shorter sequences are padded on the right: attention is causal and routers see single tokens, so the padding
        does not change any result.

        Args:
            requests: Sequences in any order.

        Yields:
            Index of a request, and its logits ``[len(ids) - start, V]`` float32 on the CPU.
        """
        order = sorted(range(len(requests)), key=lambda index: len(requests[index].ids))
        for batch in self._batches(order, requests):
            longest = len(requests[batch[-1]].ids)
            rows = [
                [*requests[index].ids, *[requests[index].ids[-1]] * (longest - len(requests[index].ids))]
                for index in batch
            ]
            with torch.no_grad():
                hidden_BSH = self._hidden(torch.tensor(rows))
            for row, index in enumerate(batch):
                request = requests[index]
                yield index, self._logits(hidden_BSH[row, request.start : len(request.ids)])

    # A generator that stops inside of ``no_grad`` would leave its caller without gradients.
    @torch.no_grad()
    def _logits(self, hidden_SH: Tensor) -> Tensor:
        return head(self._skeleton(), hidden_SH).float().cpu()

    def _batches(self, order: Sequence[int], requests: Sequence[Request]) -> Iterator[list[int]]:
        batch: list[int] = []
        for index in order:
            if batch and (len(batch) + 1) * len(requests[index].ids) > self._batch_tokens:
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    def continuations(self, prompts: Sequence[Sequence[int]], *, tokens: int, last: int | None) -> list[list[int]]:
        """Continues prompts greedily.

        Args:
            prompts: Token ids, all of one length.
            tokens: Maximum number of tokens to add.
            last: Id that ends a text; it is not returned. ``None`` if there is none.

        Returns:
            The added ids of every prompt.
        """
        added: list[list[int]] = [[] for _ in prompts]
        running = list(range(len(prompts)))
        for _ in range(tokens):
            sequences = [[*prompts[row], *added[row]] for row in running]
            chosen = {
                running[index]: int(logits_SV[-1].argmax())
                for index, logits_SV in self.logits([Request(ids, len(ids) - 1) for ids in sequences])
            }
            running = [row for row in running if chosen[row] != last]
            for row in running:
                added[row].append(chosen[row])
            if not running:
                break
        return added
