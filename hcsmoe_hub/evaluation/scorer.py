"""Logits of a checkpoint for sequences of token ids, whether or not the model fits into memory.

B sequences of a batch, S tokens each, H hidden size, V vocabulary. Of a model with an encoder, a sequence is N tokens
of a source and then S labels.
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
        ids: Token ids of one sequence, at least one. Logits at a position are about the token after it; where an
            encoder reads the source, about the token at the position.
        start: First position whose logits are returned, along with those of all later positions.
        source: What an encoder reads; empty for a model without one.
    """

    ids: Sequence[int]
    start: int = 0
    source: Sequence[int] = ()


class Scorer(ABC):
    """Runs a checkpoint in float32 without gradients.

    Args:
        checkpoint: The checkpoint to run.
        batch_tokens: Tokens per batch, padding included; one sequence may be longer.

    Attributes:
        checkpoint: The checkpoint that is run.
        is_unpadded: Whether only sources of one length run side by side.
    """

    is_unpadded = False

    def __init__(self, checkpoint: Checkpoint, *, batch_tokens: int) -> None:
        self.checkpoint = checkpoint
        self._batch_tokens = batch_tokens

    @abstractmethod
    def _hidden(self, ids_BS: Tensor, sources: Sequence[int]) -> Tensor:
        """Hidden states after the decoder's last norm.

        Args:
            ids_BS: Ids, ``[B, S]`` int64; with an encoder ``[B, N + S]``.
            sources: Tokens of each source without its padding, the longest of which are N; all 0 without an encoder.

        Returns:
            ``[B, S, H]`` float32.
        """

    @abstractmethod
    def _skeleton(self) -> Skeleton:
        """A skeleton whose head is loaded."""

    def logits(self, requests: Sequence[Request], *, on_host: bool = True) -> Iterator[tuple[int, Tensor]]:
        """Computes logits, shortest sequences first, in the given order among equal lengths.

        Shorter sequences are padded on the right: attention is causal, and routers see single tokens or give tokens
        room in their order, so the padding does not change any result. That of a source is hidden from attention.

        Args:
            requests: Sequences in any order.
            on_host: Whether they are brought to the CPU; otherwise they stay where the head is.

        Yields:
            Index of a request, and its logits ``[len(ids) - start, V]`` float32.
        """
        order = sorted(range(len(requests)), key=lambda index: (len(requests[index].source), len(requests[index].ids)))
        for batch in self._batches(order, requests):
            sources, targets = [requests[index].source for index in batch], [requests[index].ids for index in batch]
            ids_BS = torch.cat([_padded(sources), _padded(targets)], dim=1)
            with torch.no_grad():
                hidden_BSH = self._hidden(ids_BS, list(map(len, sources)))
            for row, index in enumerate(batch):
                request = requests[index]
                logits_SV = self._logits(hidden_BSH[row, request.start : len(request.ids)])
                yield index, logits_SV.cpu() if on_host else logits_SV

    # A generator that stops inside of ``no_grad`` would leave its caller without gradients.
    @torch.no_grad()
    def _logits(self, hidden_SH: Tensor) -> Tensor:
        return head(self._skeleton(), hidden_SH).float()

    def _batches(self, order: Sequence[int], requests: Sequence[Request]) -> Iterator[list[int]]:
        batch: list[int] = []
        width = (0, 0)
        for index in order:
            own = requests[index]
            wider = max(width[0], len(own.source)), max(width[1], len(own.ids))
            is_unlike = bool(batch) and self.is_unpadded and len(own.source) != width[0]
            if is_unlike or (batch and (len(batch) + 1) * sum(wider) > self._batch_tokens):
                yield batch
                batch, wider = [], (len(own.source), len(own.ids))
            width = wider
            batch.append(index)
        if batch:
            yield batch

    def continuations(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        tokens: int,
        last: int | None,
        begins: Sequence[Sequence[int]] = (),
    ) -> list[list[int]]:
        """Continues prompts greedily.

        Args:
            prompts: Token ids, all of one length; those that an encoder reads may be of any.
            tokens: Maximum number of tokens to add.
            last: Id that ends a text; it is not returned. ``None`` if there is none.
            begins: Ids that a decoder has written already after each source; they are not returned. Empty for a model
                without an encoder.

        Returns:
            The added ids of every prompt.
        """
        added: list[list[int]] = [[] for _ in prompts]
        running = list(range(len(prompts)))
        for _ in range(tokens):
            if begins:
                requests = [_next_label([*begins[row], *added[row]], prompts[row]) for row in running]
            else:
                requests = [Request(ids, len(ids) - 1) for ids in ([*prompts[row], *added[row]] for row in running)]
            chosen = {running[index]: int(logits_SV[-1].argmax()) for index, logits_SV in self.logits(requests)}
            running = [row for row in running if chosen[row] != last]
            for row in running:
                added[row].append(chosen[row])
            if not running:
                break
        return added


def _padded(sequences: Sequence[Sequence[int]]) -> Tensor:
    """Sequences ``[B, S]`` int64, the shorter ones filled up with their last id."""
    longest = max(map(len, sequences))
    rows = [[*ids, *ids[-1:] * (longest - len(ids))] for ids in map(list, sequences)]
    return torch.tensor(rows, dtype=torch.int64).view(len(sequences), longest)


def _next_label(written: Sequence[int], source: Sequence[int]) -> Request:
    """A request for the label after those that are written; which one stands in its place has no effect."""
    return Request([*written, 0], len(written), source)
