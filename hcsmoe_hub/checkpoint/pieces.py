"""Which byte ranges of which shards a pass over a checkpoint downloads, and in which order."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from hcsmoe_hub.checkpoint.tensors import StoredTensor

# Tensors that are read together: a decoder layer, everything outside the layers, or what the model does not load.
Step = Sequence[StoredTensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A byte range of a shard, downloaded as one file.

    Attributes:
        shard: Name of the file.
        start: Position of its first byte in the shard.
        end: Position after its last byte.
        tensors: Names of the tensors in it that the pass reads.
    """

    shard: str
    start: int
    end: int
    tensors: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return self.end - self.start


def reading_order(
    keys: Mapping[int | None, Iterable[str]], stored: Mapping[str, StoredTensor], unread: Iterable[str] = ()
) -> list[Step]:
    """The steps of a pass: everything outside the layers, the layers, and what the model does not load.

    Args:
        keys: Stored keys by decoder layer; ``None`` is everything outside the layers.
        stored: Every stored tensor.
        unread: Keys that are copied after the last layer.
    """
    layers = sorted(keys, key=lambda layer: -1 if layer is None else layer)
    return [[stored[key] for key in step] for step in (*(keys[layer] for layer in layers), unread)]


def whole_shards(steps: Sequence[Step], sizes: Mapping[str, int]) -> list[list[Piece]]:
    """Whole shards, each at the first step that reads from it.

    Args:
        steps: A pass.
        sizes: Shards to download, with their sizes in bytes.
    """
    names: dict[str, list[str]] = {}
    for tensor in (tensor for step in steps for tensor in step if tensor.shard in sizes and tensor.nbytes):
        names.setdefault(tensor.shard, []).append(tensor.name)
    pieces = []
    for step in steps:
        found = dict.fromkeys(tensor.shard for tensor in step if tensor.nbytes and tensor.shard in names)
        pieces.append(
            [Piece(shard=shard, start=0, end=sizes[shard], tensors=tuple(names.pop(shard))) for shard in sorted(found)]
        )
    return pieces


def layer_pieces(steps: Sequence[Step], sizes: Mapping[str, int]) -> list[list[Piece]]:
    """Exactly the bytes that each step reads.

    Most checkpoints store a layer in one or two ranges. Steps do not share downloads, so what a step has read can be
    deleted, and no byte is downloaded twice.

    Args:
        steps: A pass.
        sizes: Shards to download, with their sizes in bytes.
    """
    pieces = []
    for step in steps:
        runs: list[list[StoredTensor]] = []
        wanted = [tensor for tensor in step if tensor.shard in sizes and tensor.nbytes]
        for tensor in sorted(wanted, key=lambda tensor: (tensor.shard, tensor.offset)):
            before = runs[-1][-1] if runs else None
            if before is not None and (before.shard, before.offset + before.nbytes) == (tensor.shard, tensor.offset):
                runs[-1].append(tensor)
            else:
                runs.append([tensor])
        pieces.append(
            [
                Piece(
                    shard=run[0].shard,
                    start=run[0].offset,
                    end=run[-1].offset + run[-1].nbytes,
                    tensors=tuple(tensor.name for tensor in run),
                )
                for run in runs
            ]
        )
    return pieces


def download_bytes(steps: Iterable[Iterable[Piece]]) -> int:
    """Bytes of all pieces."""
    return sum(piece.nbytes for step in steps for piece in step)


def largest_pair(steps: Sequence[Sequence[Piece]]) -> int:
    """Bytes of the largest two consecutive steps, the most that a feed that deletes what was read has on disk."""
    sizes = [download_bytes([step]) for step in steps]
    return max((sum(pair) for pair in pairwise(sizes)), default=sum(sizes))
