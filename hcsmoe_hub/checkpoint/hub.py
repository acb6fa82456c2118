"""Checkpoints on the Hugging Face Hub: one commit, headers by range request, shards when they are needed."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import huggingface_hub
from huggingface_hub import HfApi, constants, errors

from hcsmoe_hub.checkpoint.source import Source
from hcsmoe_hub.checkpoint.tensors import StoredTensor, local_header, stored_tensors
from hcsmoe_hub.errors import SourceError

# Most specific first: GatedRepoError is a RepositoryNotFoundError, and most are HfHubHTTPErrors.
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
        "drop --revision, or list the branches and tags with 'hf repos branch list {repo}'",
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
    (
        errors.SafetensorsParsingError,
        "{repo} holds a safetensors file with an unreadable header",
        "tell the owners of the repository, or pass another --revision",
    ),
    (errors.HfHubHTTPError, "the Hub refused a request for {repo}: {error}", "try again later"),
    (ConnectionError, "the Hub cannot be reached for {repo}: {error}", "check the network, or HF_ENDPOINT"),
)


@contextmanager
def explained(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turns the Hub client's errors into one message each.

    Raises:
        SourceError: In place of every known error of the client.
    """
    try:
        yield
    except tuple(kind for kind, _, _ in EXPLANATIONS) as error:
        for kind, message, hint in EXPLANATIONS:
            if isinstance(error, kind):
                first_line = (str(error).splitlines() or [type(error).__name__])[0]
                values = {"repo": repo_id, "revision": revision or "main", "error": first_line}
                raise SourceError(message.format(**values) + ".", hint=hint.format(**values)) from error
        raise


class HubSource(Source):
    """A repository at one commit, read through the Hub client and its cache."""

    def __init__(self, repo_id: str, *, commit: str, files: list[str], token: str | None, cache_dir: Path | None) -> None:
        self.repo_id = repo_id
        self.revision = commit
        self.name = repo_id.split("/")[-1]
        self._files = files
        self._token = token
        self._cache_dir = cache_dir
        self._api = HfApi(token=token)

    def files(self) -> list[str]:
        return self._files

    def cached(self, file: str) -> Path | None:
        """Path of ``file`` in the cache, or ``None``."""
        assert self.repo_id is not None
        found = huggingface_hub.try_to_load_from_cache(
            self.repo_id, file, revision=self.revision, cache_dir=self._cache_dir
        )
        return Path(found) if isinstance(found, str) else None

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
            metadata, data_start = local_header(path)
        else:
            with explained(self.repo_id, self.revision):
                metadata = self._api.parse_safetensors_file_metadata(self.repo_id, shard, revision=self.revision)
            # The format allows no bytes after the data, so the data begin this far from the end of the file.
            data_start = file_bytes - max((info.data_offsets[1] for info in metadata.tensors.values()), default=0)
        return stored_tensors(metadata, shard=shard, data_start=data_start, file_bytes=file_bytes)

    def download_bytes(self) -> int:
        return sum(size for shard, size in self.shard_bytes.items() if self.cached(shard) is None)


def _resolve(repo_id: str, revision: str | None, api: HfApi, cache_dir: Path | None) -> tuple[str, list[str]]:
    """Commit and file list of a repository; from the cache when the Hub is switched off."""
    if not constants.HF_HUB_OFFLINE:
        info = api.model_info(repo_id, revision=revision)
        return str(info.sha), sorted(sibling.rfilename for sibling in info.siblings or ())
    snapshot = Path(
        huggingface_hub.snapshot_download(repo_id, revision=revision, cache_dir=cache_dir, local_files_only=True)
    )
    return snapshot.name, sorted(file.relative_to(snapshot).as_posix() for file in snapshot.rglob("*") if file.is_file())


def open_hub_source(source: str, *, revision: str | None, token: str | None, cache_dir: Path | None) -> HubSource:
    """Resolves a repository to one commit.

    Args:
        source: ``org/name``, ``hf://org/name`` or ``hf://org/name@revision``.
        revision: Branch, tag or commit; must agree with one written into ``source``.

    Raises:
        SourceError: If the repository cannot be reached, or two revisions were given.
    """
    repo_id, _, written = source.removeprefix("hf://").partition("@")
    if written and revision is not None and written != revision:
        raise SourceError(f"two revisions were given: {written} and {revision}.", hint="keep one of them")
    revision = revision or written or None
    with explained(repo_id, revision):
        commit, files = _resolve(repo_id, revision, HfApi(token=token), cache_dir)
    return HubSource(repo_id, commit=commit, files=files, token=token, cache_dir=cache_dir)


