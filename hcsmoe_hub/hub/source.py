"""Checkpoints on the Hugging Face Hub: one commit, headers by range request, shards when they are needed."""

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from hashlib import file_digest
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
from hcsmoe_hub.hub.download_folder import download_folder
from hcsmoe_hub.hub.read_errors import translate_read_errors
from hcsmoe_hub.hub.retry import REQUEST_ERRORS, with_retries
from hcsmoe_hub.hub.session import session_problem
from hcsmoe_hub.hub.transfer import receive

# What a conversion may read: a cached snapshot with these is complete, whatever else the repository holds.
READ_FILES = ("config.json", "model*.safetensors*", *SIDECARS)
# Folder of unfinished downloads inside the repository's cache folder, so that cleaning the cache removes them too.
DOWNLOADS = "hcsmoe"


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
        self.cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser().resolve()
        self._folder = self.cache / repo_folder_name(repo_id=found.repo_id, repo_type="model")
        self._files = found.files
        self._token = token
        self._api = HfApi(token=token)
        # Name under which the cache keeps the content of a shard, for every commit that contains it.
        self._blobs: dict[str, str] = {}
        if constants.HF_HUB_OFFLINE:
            self.missing_hint = f"offline mode is on: unset HF_HUB_OFFLINE, or run 'hf download {found.repo_id}' first"
        else:
            self.missing_hint = "report this to the owners of the repository, or pass another `revision`"
        self.weights_hint = (
            "convert the weights to safetensors first, or pass a `revision` that has them: pull requests are "
            f"revisions too, see https://huggingface.co/{found.repo_id}/discussions"
        )

    def files(self) -> list[str]:
        return self._files

    def cached(self, file: str) -> Path | None:
        """Path of ``file`` in the cache, or ``None``."""
        assert self.repo_id is not None
        found = huggingface_hub.try_to_load_from_cache(self.repo_id, file, revision=self.revision, cache_dir=self.cache)
        if isinstance(found, str):
            return Path(found)
        blob = self._folder / "blobs" / self._blobs[file] if file in self._blobs else None
        return blob if blob is not None and blob.is_file() else None

    def is_local(self, file: str) -> bool:
        return self.cached(file) is not None

    def fetch(self, file: str) -> Path:
        if file in self._blobs and not self.is_local(file):
            self._download(file)
        with translate_read_errors(self.label, self.revision):
            path = with_retries(
                lambda: huggingface_hub.hf_hub_download(
                    self.label, file, revision=self.revision, token=self._token, cache_dir=self.cache
                )
            )
        with Path(path).open("rb") as content:
            refuse_pointer(content.read(POINTER_BYTES), file=f"{self.label}/{file}")
        return Path(path)

    def _download(self, shard: str) -> None:
        """Downloads a shard into the cache, resuming what an earlier run left of it."""
        tensors = [tensor for tensor in self.tensors.values() if tensor.shard == shard and tensor.nbytes]
        with self.feed([tensors]) as feed:
            if feed is not None:
                feed.find(tensors[0].name)

    @cached_property
    def shard_bytes(self) -> dict[str, int]:
        """Size of every shard as the Hub reports it; cached shards are measured instead."""
        sizes = {shard: path.stat().st_size for shard in self.shards if (path := self.cached(shard))}
        missing = [shard for shard in self.shards if shard not in sizes]
        if missing:
            with translate_read_errors(self.label, self.revision):
                entries: Sequence[Any] = with_retries(
                    lambda: self._api.get_paths_info(self.label, missing, revision=self.revision)
                )
            for entry in entries:
                if hasattr(entry, "size"):
                    sizes[entry.path] = entry.size
                    self._blobs[entry.path] = entry.blob_id if entry.lfs is None else entry.lfs.sha256
        return sizes

    def shard_tensors(self, shard: str) -> dict[str, StoredTensor]:
        file_bytes = self.shard_bytes[shard]
        path = self.cached(shard)
        if path is not None:
            header, data_start = local_header(path)
        else:
            header, data_start = read_header(
                lambda start, end: self._read_remote(shard, start, min(end, file_bytes)), shard=shard
            )
        return stored_tensors(header, shard=shard, data_start=data_start, file_bytes=file_bytes)

    def peek(self, tensor: StoredTensor, count: int) -> bytes:
        path = self.cached(tensor.shard)
        if path is not None:
            return local_bytes(path, tensor, count)
        return self._read_remote(tensor.shard, tensor.offset, tensor.offset + min(count, tensor.nbytes))

    def _read_remote(self, file: str, start: int, end: int) -> bytes:
        """Downloads a byte range of a file."""
        if start >= end:
            return b""
        headers = {**self._headers(), "Range": f"bytes={start}-{end - 1}"}
        with translate_read_errors(self.label, self.revision):
            response = http_backoff("GET", self._url(file), headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
            hf_raise_for_status(response)
        # A mirror may ignore the range and answer with the whole file.
        return response.content if response.status_code == 206 else response.content[start:end]

    def _url(self, file: str) -> str:
        return huggingface_hub.hf_hub_url(self.label, file, revision=self.revision)

    def _headers(self) -> dict[str, str]:
        return build_hf_headers(token=self._token)

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
        lost = sorted({piece.shard for step in pieces for piece in step} - self._blobs.keys())
        if lost:
            raise SourceError(
                f"{lost[0]} of {self.label} has left the cache since its header was read.",
                hint="run the same command again",
            )
        # Leftovers from the middle of an earlier pass would take up disk space until this one reaches them.
        first = pieces[:2] if low_disk else pieces
        wanted = [_file_name(piece) for step in first for piece in step]
        started: set[str] = set()
        with ExitStack() as stack:
            with translate_read_errors(self.label, self.revision):
                folder = stack.enter_context(download_folder(self._folder / DOWNLOADS, str(self.revision), wanted))

            def fetch(piece: Piece, stop: threading.Event) -> Path:
                if piece.shard not in started:
                    started.add(piece.shard)
                    emit(Fetching(piece.shard, self.shards.index(piece.shard) + 1, len(self.shards)))
                path = self._receive(piece, folder / _file_name(piece), stop)
                return path if low_disk else self._move_to_cache(piece.shard, path)

            feed = Feed(pieces, fetch, removes=low_disk)
            stack.callback(feed.close)
            yield feed

    def _receive(self, piece: Piece, path: Path, stop: threading.Event) -> Path:
        """Downloads a piece, resuming what an earlier run left of it."""
        is_continued = path.exists()
        with translate_read_errors(self.label, self.revision):
            receive(self._url(piece.shard), path, start=piece.start, end=piece.end, headers=self._headers(), stop=stop)
            is_whole = piece.nbytes == self.shard_bytes[piece.shard]
            if is_continued and is_whole and not self._has_expected_hash(piece.shard, path):
                # The earlier run did not end cleanly.
                path.unlink()
                self._receive(piece, path, stop)
        return path

    def _has_expected_hash(self, shard: str, path: Path) -> bool:
        """Whether a shard has the Hub's hash; True for small files, for which the Hub has no SHA-256."""
        expected = self._blobs[shard]
        with path.open("rb") as file:
            return len(expected) != 64 or file_digest(file, "sha256").hexdigest() == expected

    def _move_to_cache(self, shard: str, path: Path) -> Path:
        """Moves a shard into the cache, where the client then links its name to it."""
        with translate_read_errors(self.label, self.revision):
            blob = self._folder / "blobs" / self._blobs[shard]
            blob.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, blob)
        return self.fetch(shard)


def _file_name(piece: Piece) -> str:
    """Name of a piece in the download folder."""
    return f"{piece.shard.replace('/', '--')}.{piece.start}-{piece.end}"


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


def is_address(source: str) -> bool:
    """Whether a source is an address from a browser, with or without ``https://``, or one to clone from."""
    lowered = source.lower()
    return lowered.startswith(("https://", "http://", "git@")) or lowered.split("/")[0] in constants.HF_URL_HOSTS


def _parse(source: str) -> tuple[str, str]:
    """Repository and revision that a source names; the revision is empty if it names none.

    Raises:
        SourceError: If it is an address, but not that of a model repository.
    """
    if not is_address(source):
        repo_id, _, revision = source.removeprefix("hf://").partition("@")
        return repo_id, revision
    hint = "pass the repository as org/name, and a branch with `revision`"
    try:
        found = huggingface_hub.parse_hf_uri(source, endpoint=constants.ENDPOINT)
    except (errors.HfUriError, ValueError) as error:
        reason = error.msg if isinstance(error, errors.HfUriError) else str(error)
        raise SourceError(f"{source} is not the address of a repository: {reason.rstrip('.')}.", hint=hint) from None
    if found.type != "model":
        raise _not_a_model(found.id, found.type)
    # The page of a file belongs to its repository; that of a folder may hold another checkpoint.
    if found.path_in_repo and "/tree/" in source:
        raise SourceError(
            f"{source} is the folder {found.path_in_repo} of {found.id}, but hcsmoe reads whole repositories.",
            hint="download that folder with 'hf download' and pass it, or write a branch with a slash as `revision`",
        )
    return found.id, found.revision or ""


def _not_a_model(repo_id: str, kind: str) -> SourceError:
    return SourceError(f"{repo_id} is a {kind} on the Hub, not a model.", hint="pass the id of a model repository")


def open_hub_source(source: str, *, revision: str | None, token: str | None, cache_dir: Path | None) -> HubSource:
    """Resolves a repository to one commit.

    Args:
        source: ``org/name``, ``hf://org/name``, ``hf://org/name@revision``, or the address of the repository's page.
        revision: Branch, tag or commit; must agree with one written into ``source``.

    Raises:
        SourceError: If the repository cannot be reached, two revisions were given, or the token is malformed.
    """
    repo_id, written = _parse(source)
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
    with translate_read_errors(repo_id, revision, folder=source if source == repo_id else None):
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
            raise _not_a_model(repo_id, kind) from error
    return HubSource(found, requested_id=repo_id, token=token, cache_dir=cache_dir)
