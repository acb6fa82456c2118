"""What a pass has to download, step by step: whole shards, or the bytes of each layer."""

import random
from itertools import pairwise

import pytest
import torch

from hcsmoe_hub.checkpoint.pieces import download_bytes, largest_pair, layer_pieces, reading_order, whole_shards
from hcsmoe_hub.checkpoint.tensors import StoredTensor

HEADER_BYTES = 100


def shards(**shapes: list[tuple[str, int]]) -> dict[str, StoredTensor]:
    """Tensors of one byte per element, shard by shard."""
    tensors = {}
    for shard, entries in shapes.items():
        offset = HEADER_BYTES
        for name, size in entries:
            tensors[name] = StoredTensor(name=name, dtype=torch.uint8, shape=(size,), shard=shard, offset=offset)
            offset += size
    return tensors


STORED = shards(
    first=[("embed", 50), ("0.up", 10), ("0.down", 10), ("1.up", 10)],
    last=[("1.down", 10), ("2.up", 10), ("dropped", 5), ("2.down", 10), ("head", 50), ("empty", 0)],
)
SIZES = {"first": 180, "last": 185}
KEYS = {
    None: ["embed", "head", "empty"],
    2: ["2.down", "2.up"],
    0: ["0.up", "0.down"],
    1: ["1.up", "1.down"],
}
STEPS = reading_order(KEYS, STORED)


def scattered(seed: int) -> tuple[list[list[StoredTensor]], dict[str, int]]:
    """Four steps whose tensors are scattered over three shards, unlike in a real checkpoint."""
    generator = random.Random(seed)
    names = [f"{step}.{number}" for step in range(4) for number in range(6)]
    generator.shuffle(names)
    stored = shards(
        **{f"shard-{part}": [(name, generator.randrange(40)) for name in names[part::3]] for part in range(3)}
    )
    steps = [[stored[name] for name in sorted(stored) if name.startswith(f"{step}.")] for step in range(4)]
    return steps, dict.fromkeys([f"shard-{part}" for part in range(3)], 10_000)


def test_tensors_outside_the_layers_are_read_first_and_those_that_are_not_loaded_last() -> None:
    steps = reading_order(KEYS, STORED, ["dropped"])
    assert [[tensor.name for tensor in step] for step in steps] == [
        ["embed", "head", "empty"],
        ["0.up", "0.down"],
        ["1.up", "1.down"],
        ["2.down", "2.up"],
        ["dropped"],
    ]


def test_a_whole_shard_comes_with_the_first_step_that_reads_from_it() -> None:
    pieces = whole_shards(STEPS, SIZES)
    assert [[(piece.shard, piece.start, piece.end) for piece in step] for step in pieces] == [
        [("first", 0, 180), ("last", 0, 185)],
        *[[]] * 4,
    ]
    assert set(pieces[0][1].tensors) == {"head", "1.down", "2.up", "2.down"}


def test_a_step_downloads_its_own_bytes_in_ranges() -> None:
    pieces = layer_pieces(STEPS, SIZES)
    assert [[(piece.shard, piece.start, piece.end) for piece in step] for step in pieces] == [
        [("first", 100, 150), ("last", 135, 185)],
        [("first", 150, 170)],
        [("first", 170, 180), ("last", 100, 110)],
        # The dropped tensor between the two is left out.
        [("last", 110, 120), ("last", 125, 135)],
        [],
    ]


@pytest.mark.parametrize("cut", [whole_shards, layer_pieces])
def test_local_shards_are_not_downloaded(cut) -> None:
    pieces = cut(STEPS, {"last": 185})
    assert {piece.shard for step in pieces for piece in step} == {"last"}
    assert not any(cut(STEPS, {}))


@pytest.mark.parametrize("seed", range(4))
def test_every_byte_that_is_read_is_downloaded_once_and_with_its_own_step(seed: int) -> None:
    steps, sizes = scattered(seed)
    for step, pieces in zip(steps, layer_pieces(steps, sizes), strict=True):
        read = sorted((tensor.shard, tensor.offset + byte) for tensor in step for byte in range(tensor.nbytes))
        brought = sorted((piece.shard, byte) for piece in pieces for byte in range(piece.start, piece.end))
        assert brought == read
        assert {name for piece in pieces for name in piece.tensors} == {tensor.name for tensor in step if tensor.nbytes}


@pytest.mark.parametrize("seed", range(4))
def test_two_steps_never_need_more_than_the_shards_that_contain_them(seed: int) -> None:
    steps, _ = scattered(seed)
    ends: dict[str, int] = {}
    for tensor in (tensor for step in steps for tensor in step):
        ends[tensor.shard] = max(ends.get(tensor.shard, 0), tensor.offset + tensor.nbytes)
    of_pairs = [sum(ends[name] for name in {t.shard for t in (*a, *b)}) for a, b in pairwise(steps)]
    assert largest_pair(layer_pieces(steps, ends)) <= max(of_pairs)


def test_sizes_are_those_of_the_pieces() -> None:
    pieces = layer_pieces(STEPS, SIZES)
    assert download_bytes(pieces) == 100 + 20 + 20 + 20
    assert largest_pair(pieces) == 100 + 20
    assert largest_pair(pieces[:1]) == 100
    assert largest_pair([]) == 0
