"""Checkpoints on the Hugging Face Hub: one commit, headers by range request, shards when they are needed."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import HfApi, constants, errors
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

from hcsmoe_hub.checkpoint.feed import Feed
from hcsmoe_hub.checkpoint.lfs import POINTER_BYTES, refuse_pointer
from hcsmoe_hub.checkpoint.pieces import Piece, Step, layer_pieces, whole_shards
from hcsmoe_hub.checkpoint.sidecars import SIDECARS
from hcsmoe_hub.checkpoint.source import Source
from hcsmoe_hub.checkpoint.tensors import StoredTensor, local_bytes, local_header, read_header, stored_tensors
from hcsmoe_hub.errors import SourceError
from hcsmoe_hub.events import Fetching, Listener, ignore
from hcsmoe_hub.hub.address import not_a_model, parse_address
from hcsmoe_hub.hub.client_download import download_file
from hcsmoe_hub.hub.feeds import RemoteShards, feed_of_pieces, feed_of_shards
from hcsmoe_hub.hub.read_errors import translate_read_errors
from hcsmoe_hub.hub.retry import REQUEST_ERRORS, with_retries
from hcsmoe_hub.hub.session import session_problem
from hcsmoe_hub.hub.transfer import Remote, check_answer

# What a conversion may read: a cached snapshot with these is complete, whatever else the repository holds.
READ_FILES = ("config.json", "model*.safetensors*", *SIDECARS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """A repository as the Hub, or the cache in offline mode, describes it.

    Attributes:
        repo_id: Its current id.
        commit: The commit that a revision resolves to.
        files: Names of its files at that commit.
        gated: Whether it is gated; ``None`` in offline mode.
    """

    repo_id: str
    commit: str
    files: list[str]
    gated: bool | None = None


class HubSource(Source):
    """A repository at one commit, read through the Hub client and its cache."""

    def __init__(self, found: Resolved, *, requested_id: str, token: str | None, cache_dir: Path | None) -> None:
        self.repo_id = found.repo_id
        self.renamed_from = requested_id if requested_id.lower() != found.repo_id.lower() else None
        self.revision = found.commit
        self.gated = found.gated
        self.name = found.repo_id.split("/")[-1]
        self.cache = self._cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser().resolve()
        self._folder = self._cache / repo_folder_name(repo_id=found.repo_id, repo_type="model")
        self._files = found.files
        self._token = token
        self._api = HfApi(token=token)
        # Name under which the cache keeps the content of a shard, for every commit that contains it.
        self._blobs: dict[str, str] = {}
        self._headers_read: dict[str, bytes] = {}
        if constants.HF_HUB_OFFLINE:
            self.missing_hint = f"offline mode is on: unset HF_HUB_OFFLINE, or run 'hf download {found.repo_id}' first"
        else:
            self.missing_hint = "report this to the owners of the repository, or pass another `revision`"
        self.weights_hint = (
            "convert the weights to safetensors first, with from_pretrained() and save_pretrained() of transformers, "
            "or pass a `revision` that has them: pull requests are revisions too, see "
            f"https://huggingface.co/{found.repo_id}/discussions"
        )

    def files(self) -> list[str]:
        return self._files

    def cached(self, file: str) -> Path | None:
        """Path of ``file`` in the cache, or ``None``."""
        assert self.repo_id is not None
        found = huggingface_hub.try_to_load_from_cache(
            self.repo_id, file, revision=self.revision, cache_dir=self._cache
        )
        if isinstance(found, str):
            return Path(found)
        blob = self._folder / "blobs" / self._blobs[file] if file in self._blobs else None
        return blob if blob is not None and blob.is_file() else None

    def is_local(self, file: str) -> bool:
        return self.cached(file) is not None

    def fetch(self, file: str) -> Path:
        with translate_read_errors(self.label, self.revision, cache=self._cache):
            path = download_file(self.label, file, revision=self.revision, token=self._token, cache=self._cache)
            with path.open("rb") as content:
                refuse_pointer(content.read(POINTER_BYTES), file=f"{self.label}/{file}")
        return path

    def check_unchanged(self, shard: str, descriptor: int) -> None:
        size = os.fstat(descriptor).st_size
        if size != self.shard_bytes[shard]:
            raise SourceError(
                f"{shard} of {self.label} has {size} bytes in the cache, but should have {self.shard_bytes[shard]}.",
                hint=f"delete {self.cached(shard)}, and run the same command again",
            )

    @cached_property
    def shard_bytes(self) -> dict[str, int]:
        """Size of every shard as the Hub reports it; cached shards are measured instead."""
        sizes = {shard: path.stat().st_size for shard in self.shards if (path := self.cached(shard))}
        return sizes | self._ask([shard for shard in self.shards if shard not in sizes])

    def _ask(self, shards: Sequence[str]) -> dict[str, int]:
        """Sizes of shards as the Hub reports them; remembers their hashes."""
        if not shards:
            return {}
        with translate_read_errors(self.label, self.revision, cache=self._cache):
            entries: Sequence[Any] = with_retries(
                lambda: self._api.get_paths_info(self.label, list(shards), revision=self.revision)
            )
        files = [entry for entry in entries if hasattr(entry, "size")]
        for entry in files:
            self._blobs[entry.path] = entry.blob_id if entry.lfs is None else entry.lfs.sha256
        return {entry.path: entry.size for entry in files}

    def shard_tensors(self, shard: str) -> dict[str, StoredTensor]:
        file_bytes = self.shard_bytes[shard]
        path = self.cached(shard)
        if path is not None:
            header, data_start = local_header(path)
        else:
            header, data_start = self._remote_header(shard)
        return stored_tensors(header, shard=shard, data_start=data_start, file_bytes=file_bytes)

    def _remote_header(self, shard: str) -> tuple[dict[str, Any], int]:
        """Header of a shard that is not in the cache, and where its tensors begin; remembers the header's bytes."""
        received = bytearray()

        def read(start: int, end: int) -> bytes:
            content = self._read_remote(shard, start, min(end, self.shard_bytes[shard]))
            received[start : start + len(content)] = content
            return content

        header, data_start = read_header(read, shard=shard)
        self._headers_read[shard] = bytes(received[:data_start])
        return header, data_start

    def peek(self, tensor: StoredTensor, count: int) -> bytes:
        path = self.cached(tensor.shard)
        if path is not None:
            return local_bytes(path, tensor, count)
        return self._read_remote(tensor.shard, tensor.offset, tensor.offset + min(count, tensor.nbytes))

    def _read_remote(self, file: str, start: int, end: int) -> bytes:
        """Downloads a byte range of a file."""
        if start >= end:
            return b""
        remote = self._remote(file)
        headers = {**remote.headers, "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        with translate_read_errors(self.label, self.revision, cache=self._cache):
            response = http_backoff("GET", remote.url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
            hf_raise_for_status(response)
            check_answer(response, remote, start)
        # A mirror may ignore the range and answer with the whole file.
        return response.content if response.status_code == 206 else response.content[start:end]

    def _remote(self, shard: str) -> Remote:
        return Remote(
            url=huggingface_hub.hf_hub_url(self.label, shard, revision=self.revision),
            headers=build_hf_headers(token=self._token),
            size=self.shard_bytes[shard],
            etag=self._blobs.get(shard, ""),
        )

    def pieces(self, steps: Sequence[Step], *, low_disk: bool) -> list[list[Piece]]:
        shards = {tensor.shard for step in steps for tensor in step}
        sizes = {shard: self.shard_bytes[shard] for shard in shards if not self.is_local(shard)}
        return layer_pieces(steps, sizes) if low_disk else whole_shards(steps, sizes)

    @contextmanager
    def feed(self, steps: Sequence[Step], *, low_disk: bool = False, emit: Listener = ignore) -> Iterator[Feed | None]:
        pieces = self.pieces(steps, low_disk=low_disk)
        if not any(pieces):
            yield None
            return
        # Shards that have left the cache since their headers were read are downloaded like others.
        self._ask(sorted({piece.shard for step in pieces for piece in step} - self._blobs.keys()))
        begun: set[str] = set()

        def note(shard: str) -> None:
            if shard not in begun:
                begun.add(shard)
                emit(Fetching(shard, self.shards.index(shard) + 1, len(self.shards)))

        repository = RemoteShards(
            repo_id=self.label,
            revision=str(self.revision),
            token=self._token,
            cache=self._cache,
            folder=self._folder,
            remote=self._remote,
            header=self._headers_read.get,
        )
        with feed_of_pieces(repository, pieces, note) if low_disk else feed_of_shards(repository, pieces, note) as feed:
            yield feed


def _resolve(repo_id: str, revision: str | None, api: HfApi, cache_dir: Path | None) -> Resolved:
    """What a repository holds at a revision; from the cache in offline mode."""
    if not constants.HF_HUB_OFFLINE:

        def commit_of(repo_id: str) -> str:
            # Also stores the revision's name in the cache, without which offline mode would not find the commit.
            return api.resolve_revision(repo_id, revision=revision, cache_dir=cache_dir).resolved

        commit = with_retries(lambda: commit_of(repo_id), is_first=True)
        info = with_retries(lambda: api.model_info(repo_id, revision=commit))
        if info.id != repo_id:
            # The Hub redirects a former name; the cache does not.
            with_retries(lambda: commit_of(info.id))
        files = sorted(sibling.rfilename for sibling in info.siblings or ())
        return Resolved(repo_id=info.id, commit=commit, files=files, gated=bool(info.gated))
    try:
        snapshot = Path(
            huggingface_hub.snapshot_download(
                repo_id, revision=revision, cache_dir=cache_dir, local_files_only=True, allow_patterns=list(READ_FILES)
            )
        )
    except errors.LocalEntryNotFoundError as error:
        raise errors.OfflineModeIsEnabled(str(error)) from error
    files = [file.relative_to(snapshot).as_posix() for file in snapshot.rglob("*") if file.is_file()]
    return Resolved(repo_id=repo_id, commit=snapshot.name, files=sorted(files))


def _other_repo_type(repo_id: str, api: HfApi) -> str | None:
    """``dataset`` or ``space`` if the id belongs to one, otherwise ``None``."""
    for kind in ("dataset", "space"):
        try:
            api.repo_info(repo_id, repo_type=kind)
        except REQUEST_ERRORS:
            continue
        return kind
    return None


def open_hub_source(source: str, *, revision: str | None, token: str | None, cache_dir: Path | None) -> HubSource:
    """Resolves a repository to one commit.

    Args:
        source: ``org/name``, ``hf://org/name``, ``hf://org/name@revision``, or the address of the repository's page.
        revision: Branch, tag or commit; must agree with one written into ``source``.

    Raises:
        SourceError: If the repository cannot be reached, two revisions were given, or the token is malformed.
    """
    repo_id, written = parse_address(source)
    if written and revision is not None and written != revision:
        raise SourceError(f"two revisions were given: {written} and {revision}.", hint="keep one of them")
    revision, token = revision or written or None, token or None
    sent = token or huggingface_hub.get_token() or ""
    if not sent.isascii() or not sent.isprintable() or " " in sent:
        # Refused here: the transport's own error would repeat the token.
        raise SourceError(
            "the access token contains invalid characters.",
            hint="copy it again from https://huggingface.co/settings/tokens",
        )
    problem = None if constants.HF_HUB_OFFLINE else session_problem()
    if problem is not None:
        raise SourceError(problem[0], hint=problem[1])
    api = HfApi(token=token)
    with translate_read_errors(repo_id, revision, folder=source if source == repo_id else None, cache=cache_dir):
        try:
            found = _resolve(repo_id, revision, api, cache_dir)
        except errors.RepositoryNotFoundError as error:
            kind = (
                None
                if isinstance(error, (errors.GatedRepoError, errors.DisabledRepoError))
                else _other_repo_type(repo_id, api)
            )
            if kind is None:
                raise
            raise not_a_model(repo_id, kind) from error
    return HubSource(found, requested_id=repo_id, token=token, cache_dir=cache_dir)
