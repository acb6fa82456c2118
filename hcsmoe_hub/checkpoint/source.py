"""Where a checkpoint comes from: a local folder, or a Hub repository at one commit."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

from hcsmoe_hub.checkpoint.feed import Feed
from hcsmoe_hub.checkpoint.pieces import Piece, Step
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
from hcsmoe_hub.errors import SourceError
from hcsmoe_hub.events import Listener, ignore

# A large model has a hundred shards, and on the Hub each header is a request.
HEADER_THREADS = 8
# Enough of a tensor to distinguish two sets of weights.
PEEKED_BYTES = 4096
# Weights in formats that are never opened: pickles can run code, the others are not safetensors.
FOREIGN_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.msgpack", "*.h5", "*.gguf", "*.onnx")


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
    weights_hint: str = "convert the weights to safetensors first"

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
            SourceError: If it is not UTF-8 text.
        """
        try:
            return self.fetch(file).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise SourceError(
                f"{self.label}/{file} is not UTF-8 text: {error}.", hint="download the checkpoint again"
            ) from None

    @cached_property
    def config(self) -> dict[str, Any]:
        """The raw ``config.json``."""
        if "config.json" not in self.files():
            foreign = self._foreign_weights()
            raise SourceError(
                f"{self.label} has no config.json{f', only {foreign}' if foreign else ''}, "
                "so it is not a transformers checkpoint.",
                hint="pass the folder or repository that holds config.json and the safetensors shards",
            )
        return parse_config(self.text("config.json"), where=f"{self.label}/config.json")

    @cached_property
    def weight_map(self) -> dict[str, str] | None:
        """Tensor name to shard name, from the index; ``None`` for a single file."""
        if SINGLE_FILE in self.files() or INDEX_FILE not in self.files():
            return None
        return read_index(self.text(INDEX_FILE), where=f"{self.label}/{INDEX_FILE}")

    @cached_property
    def shards(self) -> list[str]:
        """Names of the safetensors files that hold the weights, sorted.

        Raises:
            SourceError: If there are none, or one that the index lists is missing.
        """
        files = self.files()
        if self.weight_map is None:
            if SINGLE_FILE in files:
                return [SINGLE_FILE]
            foreign = self._foreign_weights()
            raise SourceError(
                f"{self.label} holds {f'only {foreign}' if foreign else 'no weights'}: hcsmoe reads "
                "safetensors and never opens a pickle.",
                hint=self.weights_hint,
            )
        shards = sorted(set(self.weight_map.values()))
        missing = [shard for shard in shards if shard not in files]
        if missing:
            raise SourceError(
                f"{self.label} lacks {len(missing)} of {len(shards)} shards that its index lists: "
                f"{', '.join(missing[:3])}.",
                hint=self.missing_hint,
            )
        return shards

    def _foreign_weights(self) -> str:
        """Names of some weight files that cannot be read; empty if there are none."""
        found = [file for file in self.files() if any(fnmatch(file, pattern) for pattern in FOREIGN_WEIGHTS)]
        return ", ".join(found[:3])

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Every stored tensor, shard by shard, in the order of the file."""
        tensors: dict[str, StoredTensor] = {}
        first, *others = self.shards
        with ThreadPoolExecutor(HEADER_THREADS) as pool:
            # The first one alone: it also requests what the others share, such as the sizes of all shards.
            headers = [self.shard_tensors(first), *pool.map(self.shard_tensors, others)]
        for found in headers:
            twice = tensors.keys() & found.keys()
            if twice:
                raise SourceError(f"{self.label} stores {sorted(twice)[0]!r} twice.", hint="download it again")
            tensors |= dict(sorted(found.items(), key=lambda item: item[1].offset))
        if self.weight_map is not None:
            check_index(self.weight_map, tensors)
        return tensors


class LocalSource(Source):
    """A checkpoint in a local folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.resolve().name

    def files(self) -> list[str]:
        assert self.path is not None
        return sorted(file.relative_to(self.path).as_posix() for file in self.path.rglob("*") if file.is_file())

    def fetch(self, file: str) -> Path:
        assert self.path is not None
        return self.path / file

    def shard_tensors(self, shard: str) -> dict[str, StoredTensor]:
        path = self.fetch(shard)
        header, data_start = local_header(path)
        return stored_tensors(header, shard=shard, data_start=data_start, file_bytes=path.stat().st_size)

    def peek(self, tensor: StoredTensor, count: int) -> bytes:
        return local_bytes(self.fetch(tensor.shard), tensor, count)

    def is_local(self, file: str) -> bool:
        return True
