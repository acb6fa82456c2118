"""Checkpoints on the Hugging Face Hub: one commit, headers by range request, shards when they are needed."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import httpx2
import huggingface_hub
from huggingface_hub import HfApi, constants, errors
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

from hcsmoe_hub.checkpoint.sidecars import SIDECARS
from hcsmoe_hub.checkpoint.source import Source
from hcsmoe_hub.checkpoint.tensors import StoredTensor, local_bytes, local_header, read_header, stored_tensors
from hcsmoe_hub.errors import SourceError

# What a conversion may read: a snapshot in the cache is complete with these, whatever else the repository holds.
READ_FILES = ("config.json", "model*.safetensors*", *SIDECARS)
# Most specific first: GatedRepoError is a RepositoryNotFoundError, most are HfHubHTTPErrors, and those are OSErrors.
EXPLANATIONS: tuple[tuple[type[Exception], str, str], ...] = (
    (
        errors.GatedRepoError,
        "{repo} is gated and this login has no access to it",
        "ask for access on https://huggingface.co/{repo}, then run 'hf auth login' or pass --token",
    ),
    (
        errors.DisabledRepoError,
        "{repo} was disabled on the Hub",
        "use another copy of the model",
    ),
    (
        errors.RepositoryNotFoundError,
        "there is no folder {repo} here and no such repository on the Hub, or it is private",
        "check the spelling; for a private repository run 'hf auth login' or pass --token",
    ),
    (
        errors.RevisionNotFoundError,
        "{repo} has no revision {revision}",
        "drop --revision, or look up the branches and tags on https://huggingface.co/{repo}/tree/main",
    ),
    (
        errors.HFValidationError,
        "{repo!r} is neither a folder here nor a valid repository id",
        "write it as org/name",
    ),
    (
        errors.OfflineModeIsEnabled,
        "the Hub is switched off (HF_HUB_OFFLINE) and {repo} is not complete in the local cache",
        "unset HF_HUB_OFFLINE, or download the model first with 'hf download {repo}'",
    ),
    (
        errors.LocalEntryNotFoundError,
        "the Hub cannot be reached and {repo} is not complete in the local cache",
        "check the network, or download the model first with 'hf download {repo}'",
    ),
    (
        errors.EntryNotFoundError,
        "{repo} lacks a file that its index names",
        "tell the owners of the repository, or pass another --revision",
    ),
    (errors.HfHubHTTPError, "the Hub refused a request for {repo}: {error}", "try again later"),
    (
        errors.RevisionResolutionError,
        "the Hub cannot be reached for {repo}: {error}",
        "check the network, or HF_ENDPOINT",
    ),
    (httpx2.HTTPError, "the Hub cannot be reached for {repo}: {error}", "check the network, or HF_ENDPOINT"),
    (
        OSError,
        "{repo} cannot be downloaded: {error}",
        "check the network and the free disk space, or choose another --cache-dir",
    ),
)
KNOWN = tuple(kind for kind, _, _ in EXPLANATIONS)
# The client wraps the real reason in these when it finds nothing in the cache to fall back on.
WRAPPERS = (errors.LocalEntryNotFoundError, errors.RevisionResolutionError)
TOKEN_REFUSED = (
    "the Hub refused the access token for {repo}: {error}",
    "run 'hf auth login' again, or pass another --token",
)


def _explanation(error: BaseException) -> tuple[str, str]:
    """Message and hint for a known error."""
    if type(error) is errors.HfHubHTTPError and error.response.status_code in (401, 403):
        return TOKEN_REFUSED
    return next((message, hint) for kind, message, hint in EXPLANATIONS if isinstance(error, kind))


@contextmanager
def explained(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turns the Hub client's errors into one message each.

    Raises:
        SourceError: In place of every known error of the client.
    """
    try:
        yield
    except KNOWN as error:
        cause = error.__cause__
        reason = cause if isinstance(error, WRAPPERS) and isinstance(cause, KNOWN) else error
        message, hint = _explanation(reason)
        first_line = (str(reason).splitlines() or [type(reason).__name__])[0].rstrip(".")
        values = {"repo": repo_id, "revision": revision or "main", "error": first_line}
        raise SourceError(message.format(**values) + ".", hint=hint.format(**values)) from error


class HubSource(Source):
    """A repository at one commit, read through the Hub client and its cache."""

    def __init__(
        self, repo_id: str, *, commit: str, files: list[str], token: str | None, cache_dir: Path | None
    ) -> None:
        self.repo_id = repo_id
        self.revision = commit
        self.name = repo_id.split("/")[-1]
        self._files = files
        self._token = token
        self._cache_dir = cache_dir
        self._api = HfApi(token=token)
        if constants.HF_HUB_OFFLINE:
            self.missing_hint = f"the Hub is switched off: unset HF_HUB_OFFLINE, or run 'hf download {repo_id}' first"
        else:
            self.missing_hint = "tell the owners of the repository, or pass another --revision"

    def files(self) -> list[str]:
        return self._files

    def cached(self, file: str) -> Path | None:
        """Path of ``file`` in the cache, or ``None``."""
        assert self.repo_id is not None
        found = huggingface_hub.try_to_load_from_cache(
            self.repo_id, file, revision=self.revision, cache_dir=self._cache_dir
        )
        return Path(found) if isinstance(found, str) else None

    def is_here(self, file: str) -> bool:
        return self.cached(file) is not None

    def fetch(self, file: str) -> Path:
        assert self.repo_id is not None
        with explained(self.repo_id, self.revision):
            path = huggingface_hub.hf_hub_download(
                self.repo_id, file, revision=self.revision, token=self._token, cache_dir=self._cache_dir
            )
        return Path(path)

    @cached_property
    def shard_bytes(self) -> dict[str, int]:
        """Size of every shard as the Hub reports it; cached shards are measured instead."""
        assert self.repo_id is not None
        sizes = {shard: path.stat().st_size for shard in self.shards if (path := self.cached(shard))}
        missing = [shard for shard in self.shards if shard not in sizes]
        if missing:
            with explained(self.repo_id, self.revision):
                entries = self._api.get_paths_info(self.repo_id, missing, revision=self.revision)
            sizes |= {entry.path: entry.size for entry in entries if hasattr(entry, "size")}
        return sizes

    def shard_tensors(self, shard: str) -> dict[str, StoredTensor]:
        assert self.repo_id is not None
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
        """Bytes of a file that is not on this machine."""
        assert self.repo_id is not None
        if start >= end:
            return b""
        url = huggingface_hub.hf_hub_url(self.repo_id, file, revision=self.revision)
        headers = {**build_hf_headers(token=self._token), "Range": f"bytes={start}-{end - 1}"}
        with explained(self.repo_id, self.revision):
            response = http_backoff("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
            hf_raise_for_status(response)
        # A mirror may ignore the range and answer with the whole file.
        return response.content if response.status_code == 206 else response.content[start:end]

    def download_bytes(self) -> int:
        return sum(size for shard, size in self.shard_bytes.items() if self.cached(shard) is None)


def _resolve(repo_id: str, revision: str | None, api: HfApi, cache_dir: Path | None) -> tuple[str, list[str]]:
    """Commit and file list of a repository; from the cache when the Hub is switched off."""
    if not constants.HF_HUB_OFFLINE:
        # This also leaves the name of the revision in the cache, without which offline mode finds nothing there.
        commit = api.resolve_revision(repo_id, revision=revision, cache_dir=cache_dir).resolved
        info = api.model_info(repo_id, revision=commit)
        return commit, sorted(sibling.rfilename for sibling in info.siblings or ())
    try:
        snapshot = Path(
            huggingface_hub.snapshot_download(
                repo_id, revision=revision, cache_dir=cache_dir, local_files_only=True, allow_patterns=list(READ_FILES)
            )
        )
    except errors.LocalEntryNotFoundError as error:
        raise errors.OfflineModeIsEnabled(str(error)) from error
    files = [file.relative_to(snapshot).as_posix() for file in snapshot.rglob("*") if file.is_file()]
    return snapshot.name, sorted(files)


def open_hub_source(source: str, *, revision: str | None, token: str | None, cache_dir: Path | None) -> HubSource:
    """Resolves a repository to one commit.

    Args:
        source: ``org/name``, ``hf://org/name`` or ``hf://org/name@revision``.
        revision: Branch, tag or commit; must agree with one written into ``source``.

    Raises:
        SourceError: If the repository cannot be reached, two revisions were given, or the token is none.
    """
    repo_id, _, written = source.removeprefix("hf://").partition("@")
    if written and revision is not None and written != revision:
        raise SourceError(f"two revisions were given: {written} and {revision}.", hint="keep one of them")
    revision, token = revision or written or None, token or None
    sent = token or huggingface_hub.get_token() or ""
    if not sent.isascii() or not sent.isprintable() or " " in sent:
        # Refused here: the transport's own error would repeat the token.
        raise SourceError(
            "the access token holds characters that no token has.",
            hint="copy it again from https://huggingface.co/settings/tokens",
        )
    with explained(repo_id, revision):
        commit, files = _resolve(repo_id, revision, HfApi(token=token), cache_dir)
    return HubSource(repo_id, commit=commit, files=files, token=token, cache_dir=cache_dir)
