"""Compares shards that are downloaded in pieces with the Hub's hash."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from pathlib import Path
from typing import Protocol

from hcsmoe_hub.checkpoint.pieces import Piece
from hcsmoe_hub.hub.errors import WrongHash
from hcsmoe_hub.hub.transfer import Remote

# Pieces of at most this size wait in memory for those before them.
SMALL_BYTES = 1 << 20
READ_BYTES = 1 << 22
SHA256_DIGITS = 64


class Hash(Protocol):
    """A hash of ``hashlib``."""

    def update(self, content: bytes, /) -> None: ...

    def hexdigest(self) -> str: ...


@dataclass(slots=True)
class _State:
    """What has been hashed of a shard, and what waits: small pieces as bytes, others as files, by their position."""

    hash: Hash
    position: int
    waiting: dict[int, bytes | Path] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)


def hash_for(etag: str, size: int) -> Hash:
    """The hash that an entity tag of the Hub is: SHA-256 of a large file, or the name that Git gives to a small one."""
    return sha256() if len(etag) == SHA256_DIGITS else sha1(b"blob %d\0" % size)


class ShardHashes:
    """Hashes shards as their pieces arrive, from the first byte to the last.

    A hash goes through a shard from its start. Pieces that arrive early wait, as long as they are on the disk, or in
    memory if they are small. So a shard is compared with the Hub's hash if all of it is downloaded, and if its layers
    lie in it in the order in which they are read. That is so in nearly all shards; where layer 10 lies before layer 9,
    the size, the entity tag and the commit of every answer are all that is compared.

    Args:
        begin: Returns the header of a shard; ``None`` if it is not known, so that the shard is not compared.
        remote: Returns the hash and the size of a shard.
    """

    def __init__(self, begin: Callable[[str], bytes | None], remote: Callable[[str], Remote]) -> None:
        self._begin = begin
        self._remote = remote
        self._states: dict[str, _State | None] = {}
        self._lock = threading.Lock()

    def add(self, piece: Piece, path: Path) -> None:
        """Takes a complete piece, which must not be deleted while this runs.

        Raises:
            WrongHash: If it is the last one, and the shard differs from the Hub's.
        """
        with self._lock:
            if piece.shard not in self._states:
                self._states[piece.shard] = self._start(piece.shard)
            state = self._states[piece.shard]
        if state is None:
            return
        remote = self._remote(piece.shard)
        with state.lock:
            is_early = piece.start > state.position
            state.waiting[piece.start] = path.read_bytes() if is_early and piece.nbytes <= SMALL_BYTES else path
            while (content := state.waiting.pop(state.position, None)) is not None:
                try:
                    state.position += _update(state.hash, content)
                except FileNotFoundError:
                    # It was read before this one was there: its layer comes first.
                    self._states[piece.shard] = None
                    return
            if state.position == remote.size and state.hash.hexdigest() != remote.etag:
                raise WrongHash

    def _start(self, shard: str) -> _State | None:
        header = self._begin(shard)
        if header is None:
            return None
        remote = self._remote(shard)
        found = hash_for(remote.etag, remote.size)
        found.update(header)
        return _State(found, len(header))


def _update(found: Hash, content: bytes | Path) -> int:
    """Adds some content, and returns its size."""
    if isinstance(content, bytes):
        found.update(content)
        return len(content)
    size = 0
    with content.open("rb") as file:
        while block := file.read(READ_BYTES):
            found.update(block)
            size += len(block)
    return size
