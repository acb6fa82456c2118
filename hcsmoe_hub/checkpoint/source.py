"""Where a checkpoint comes from: a local folder, or a Hub repository at one commit."""

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from hcsmoe_hub.checkpoint.feed import Feed
from hcsmoe_hub.checkpoint.lfs import POINTER_BYTES, refuse_pointer
from hcsmoe_hub.checkpoint.pieces import Piece, Step
from hcsmoe_hub.checkpoint.shards import adapter_refusal, foreign_weights, has_adapter, shards_without_index
from hcsmoe_hub.checkpoint.sidecars import refuse_link_out
from hcsmoe_hub.checkpoint.tensors import (
    INDEX_FILE,
    SINGLE_FILE,
    StoredTensor,
    check_index,
    local_bytes,
    local_header,
    parse_config,
    read_index,
    stored_tensors,
)
from hcsmoe_hub.checkpoint.unfinished import UNFINISHED
from hcsmoe_hub.checkpoint.wrappers import unwrap
from hcsmoe_hub.errors import SourceError
from hcsmoe_hub.events import Listener, ignore

# A large model has a hundred shards, and on the Hub each header is a request.
HEADER_THREADS = 8
# An index of several hundred thousand tensors is half as long.
MAX_TEXT_BYTES = 64_000_000
# Enough of a tensor to distinguish two sets of weights.
PEEKED_BYTES = 4096


class Source(ABC):
    """A checkpoint that can be planned from its headers and read shard by shard.

    Attributes:
        name: Short name for messages and for the default output folder.
        repo_id: Hub repository, or ``None`` for a folder.
        path: Local folder, or ``None`` for a repository.
        revision: Commit of the repository, or ``None`` for a folder.
        renamed_from: Requested id, if the repository has been renamed.
        gated: Whether access must be requested on the Hub; ``None`` if unknown.
        cache: Folder that downloads go to, or ``None`` for a folder.
        missing_hint: What to do about a missing shard.
        weights_hint: What to do if there are no safetensors weights.
    """

    name: str
    repo_id: str | None = None
    path: Path | None = None
    revision: str | None = None
    renamed_from: str | None = None
    gated: bool | None = None
    cache: Path | None = None
    missing_hint: str = "download the missing shards"
    weights_hint: str = (
        "convert the weights to safetensors first: from_pretrained() of transformers reads them, and save_pretrained() "
        "writes safetensors"
    )

    @property
    def label(self) -> str:
        """Name of this source in messages."""
        return self.repo_id if self.repo_id is not None else str(self.path)

    @abstractmethod
    def files(self) -> list[str]:
        """Names of the files at the top level and in sub-folders, sorted."""

    @abstractmethod
    def fetch(self, file: str) -> Path:
        """Local path of ``file``, downloaded if necessary."""

    @abstractmethod
    def is_local(self, file: str) -> bool:
        """Whether ``fetch`` returns without a download."""

    @abstractmethod
    def check_unchanged(self, shard: str, descriptor: int) -> None:
        """Checks that an open shard is what it was when its header was read, as far as its size and time show.

        Raises:
            SourceError: If it has changed.
        """

    @abstractmethod
    def shard_tensors(self, shard: str) -> dict[str, StoredTensor]:
        """Tensors of one shard, from its header alone."""

    @abstractmethod
    def peek(self, tensor: StoredTensor, count: int) -> bytes:
        """At most ``count`` first bytes of a stored tensor, without downloading its shard."""

    def fingerprint(self, peeked: Iterable[StoredTensor]) -> str:
        """SHA-256 of the config, of the names, dtypes and shapes of all tensors, and of the first bytes of some.

        Does not depend on where the checkpoint is. On the Hub each peeked tensor is a request.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
        for tensor in peeked:
            digest.update(self.peek(tensor, PEEKED_BYTES))
        return digest.hexdigest()

    def pieces(self, steps: Sequence[Step], *, low_disk: bool) -> list[list[Piece]]:
        """What a pass would download at each of its steps.

        Args:
            steps: Tensors that are read together, in the order of the pass.
            low_disk: Whether every step downloads only its own tensors, which are deleted after it.
        """
        return [[] for _ in steps]

    @contextmanager
    def feed(self, steps: Sequence[Step], *, low_disk: bool = False, emit: Listener = ignore) -> Iterator[Feed | None]:
        """Downloads what a pass reads, ahead of the reader; ``None`` if everything is local.

        Args:
            steps: Tensors that are read together, in the order of the pass.
            low_disk: Whether downloads are deleted as soon as they have been read; otherwise they stay in the cache.
            emit: Called once per shard when its download starts, from several threads.
        """
        yield None

    def text(self, file: str) -> str:
        """Content of a small text file.

        Raises:
            SourceError: If it is not UTF-8 text, or far too long for it.
        """
        path = self._small(file)
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise SourceError(
                f"{self.label}/{file} is not UTF-8 text: {error}.", hint="download the checkpoint again"
            ) from None

    def loose_text(self, file: str) -> str:
        """Content of a small text file, with a mark in place of bytes that are not UTF-8."""
        return self._small(file).read_text(encoding="utf-8-sig", errors="replace")

    def _small(self, file: str) -> Path:
        """Path of a text file.

        Raises:
            SourceError: If it is far too long for one.
        """
        path = self.fetch(file)
        if (size := path.stat().st_size) > MAX_TEXT_BYTES:
            raise SourceError(
                f"{self.label}/{file} has {size} bytes; no such file needs more than {MAX_TEXT_BYTES}.",
                hint="do not use this checkpoint; the file is damaged or hostile",
            )
        return path

    @cached_property
    def config(self) -> dict[str, Any]:
        """The raw ``config.json``."""
        files = self.files()
        if "config.json" not in files:
            foreign = foreign_weights(files)
            if has_adapter(files):
                raise adapter_refusal(self.label)
            raise SourceError(
                f"{self.label} has no config.json{f', only {foreign}' if foreign else ''}, "
                "so it is not a transformers checkpoint.",
                hint="pass the folder or repository that holds config.json and the safetensors shards",
            )
        return parse_config(self.text("config.json"), where=f"{self.label}/config.json")

    @cached_property
    def index(self) -> dict[str, str] | None:
        """Tensor name as stored to shard name; ``None`` without an index."""
        files = self.files()
        if SINGLE_FILE in files or INDEX_FILE not in files:
            return None
        return read_index(self.text(INDEX_FILE), where=f"{self.label}/{INDEX_FILE}")

    @cached_property
    def weight_map(self) -> dict[str, str] | None:
        """Tensor name to shard name, from the index; ``None`` without an index."""
        if self.index is None:
            return None
        _, plain = self._unwrapped
        return {plain.get(name, name): shard for name, shard in self.index.items()}

    @cached_property
    def shards(self) -> list[str]:
        """Names of the safetensors files that hold the weights, sorted.

        Raises:
            SourceError: If there are none, or one is missing.
        """
        files = self.files()
        if SINGLE_FILE in files:
            return [SINGLE_FILE]
        if self.index is None:
            return shards_without_index(
                files, label=self.label, missing_hint=self.missing_hint, weights_hint=self.weights_hint
            )
        shards = sorted(set(self.index.values()))
        missing = [shard for shard in shards if shard not in files]
        if missing:
            raise SourceError(
                f"{self.label} lacks {len(missing)} of {len(shards)} shards that its index lists: "
                f"{', '.join(missing[:3])}.",
                hint=self.missing_hint,
            )
        return shards

    @cached_property
    def _stored(self) -> dict[str, StoredTensor]:
        """Every tensor under its stored name, shard by shard, in the order of the file."""
        tensors: dict[str, StoredTensor] = {}
        first, *others = self.shards
        with ThreadPoolExecutor(HEADER_THREADS) as pool:
            # The first one alone: it also requests what the others share, such as the sizes of all shards.
            headers = [self.shard_tensors(first), *pool.map(self.shard_tensors, others)]
        for shard, found in zip(self.shards, headers, strict=True):
            twice = min(tensors.keys() & found.keys(), default=None)
            if twice is not None:
                raise SourceError(
                    f"{self.label} stores {twice!r} twice: in {tensors[twice].shard} and in {shard}.",
                    hint="keep the shards of one checkpoint in the folder, with their index",
                )
            tensors |= dict(sorted(found.items(), key=lambda item: item[1].offset))
        if self.index is not None:
            check_index(self.index, tensors)
        return tensors

    @cached_property
    def _unwrapped(self) -> tuple[str, dict[str, str]]:
        return unwrap(self._stored, label=self.label)

    @property
    def wrapper(self) -> str:
        """What a wrapper such as ``torch.compile`` left in the stored names, ``_orig_mod.``; usually empty."""
        return self._unwrapped[0]

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Every stored tensor by its name without ``wrapper``, shard by shard, in the order of the file."""
        wrapper, plain = self._unwrapped
        if not wrapper:
            return self._stored
        return {plain[name]: replace(tensor, name=plain[name]) for name, tensor in self._stored.items()}


class LocalSource(Source):
    """A checkpoint in a local folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.resolve().name
        # Size and time of the last change of every shard when its header was read.
        self._states: dict[str, tuple[int, int]] = {}

    def files(self) -> list[str]:
        assert self.path is not None
        names = (file.relative_to(self.path) for file in self.path.rglob("*") if file.is_file())
        return sorted(name.as_posix() for name in names if name.parts[0] != UNFINISHED)

    def fetch(self, file: str) -> Path:
        """Path of ``file``.

        Raises:
            SourceError: If it is a Git LFS pointer, or a link that must not be followed.
        """
        assert self.path is not None
        refuse_link_out(self.path, file)
        path = self.path / file
        with path.open("rb") as content:
            refuse_pointer(content.read(POINTER_BYTES), file=str(path))
        return path

    def shard_tensors(self, shard: str) -> dict[str, StoredTensor]:
        path = self.fetch(shard)
        # Before the header: a change while that is read must count.
        self._states[shard] = _state(os.stat(path))
        header, data_start = local_header(path)
        return stored_tensors(header, shard=shard, data_start=data_start, file_bytes=self._states[shard][0])

    def check_unchanged(self, shard: str, descriptor: int) -> None:
        found, expected = _state(os.fstat(descriptor)), self._states.get(shard)
        if expected is not None and found != expected:
            sizes = f" from {expected[0]} to {found[0]} bytes" if found[0] != expected[0] else ""
            raise SourceError(
                f"{shard} of {self.label} has changed{sizes} since its header was read.",
                hint="let nothing write to the checkpoint, and add `restart=True` to begin anew",
            )

    def peek(self, tensor: StoredTensor, count: int) -> bytes:
        return local_bytes(self.fetch(tensor.shard), tensor, count)

    def is_local(self, file: str) -> bool:
        return True


def _state(found: os.stat_result) -> tuple[int, int]:
    return found.st_size, found.st_mtime_ns
