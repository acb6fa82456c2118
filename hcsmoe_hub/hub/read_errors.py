"""User-facing messages and hints for Hub read errors."""

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
from huggingface_hub import constants, errors

from hcsmoe_hub.errors import SourceError
from hcsmoe_hub.hub.errors import ForeignAnswer, XetError
from hcsmoe_hub.hub.retry import describe, root_cause
from hcsmoe_hub.hub.session import connection_hint

# Most specific first: GatedRepoError is a RepositoryNotFoundError, most are HfHubHTTPErrors, and those are OSErrors.
EXPLANATIONS: tuple[tuple[type[Exception] | tuple[type[Exception], ...], str, str], ...] = (
    (
        errors.GatedRepoError,
        "{repo} is gated and this login does not have access to it",
        "request access on https://huggingface.co/{repo}, or pass a `token` that has access",
    ),
    (
        errors.DisabledRepoError,
        "{repo} was disabled on the Hub",
        "use another copy of the model",
    ),
    (
        errors.RepositoryNotFoundError,
        "neither a local folder nor a Hub repository named {repo} was found, or it is private and this login cannot "
        "read it",
        "check the spelling; for a private repository pass a `token` that can read it",
    ),
    (
        errors.RevisionNotFoundError,
        "{repo} has no revision {revision}",
        "drop `revision`, or see the branches and tags on https://huggingface.co/{repo}/tree/main",
    ),
    (
        errors.HFValidationError,
        "{repo!r} is neither a local folder nor a valid repository id",
        "write it as org/name",
    ),
    (
        errors.OfflineModeIsEnabled,
        "offline mode is on (HF_HUB_OFFLINE) and {repo} is not complete in the local cache",
        "unset HF_HUB_OFFLINE, or download the model first with 'hf download {repo}'",
    ),
    (
        errors.LocalEntryNotFoundError,
        "the Hub cannot be reached and {repo} is not complete in the local cache",
        "check the network, or download the model first with 'hf download {repo}'",
    ),
    (
        errors.EntryNotFoundError,
        "{repo} lacks a file that its index lists",
        "report this to the owners of the repository, or pass another `revision`",
    ),
    (errors.HfHubHTTPError, "the Hub refused a request for {repo}: {error}", "try again later"),
    (
        errors.RevisionResolutionError,
        "the Hub cannot be reached for {repo}: {error}",
        "check the network, or HF_ENDPOINT",
    ),
    (httpx2.HTTPError, "the Hub cannot be reached for {repo}: {error}", "check the network, or HF_ENDPOINT"),
    (
        XetError,
        "{repo} cannot be downloaded over Xet: {error}",
        "run the same command again, or set HF_HUB_DISABLE_XET=1 to download without Xet",
    ),
    (
        (ForeignAnswer, errors.FileMetadataError),
        "the answer to a request for a file of {repo} is not from the Hub: {error}",
        "check the proxy, or HF_ENDPOINT",
    ),
    (
        json.JSONDecodeError,
        "the answer to a request for {repo} is not from the Hub: {error}",
        "check the proxy, or HF_ENDPOINT",
    ),
    (
        OSError,
        "{repo} cannot be downloaded: {error}",
        "check the network and the free disk space, or choose another `cache_dir`",
    ),
)
KNOWN: tuple[type[Exception], ...] = tuple(
    kind for kinds, _, _ in EXPLANATIONS for kind in (kinds if isinstance(kinds, tuple) else (kinds,))
)
TOKEN_REFUSED = (
    "the Hub refused the access token for {repo}: {error}",
    "run 'hf auth login' again, or pass another `token`",
)
# Errors that the Hub reports in the same way with and without a login.
NO_LOGIN: dict[type[Exception], tuple[str, str]] = {
    errors.GatedRepoError: (
        "{repo} is gated and you are not logged in",
        "request access on https://huggingface.co/{repo}, then run 'hf auth login' or pass `token`",
    ),
    errors.RepositoryNotFoundError: (
        "neither a local folder nor a Hub repository named {repo} was found, or it is private and you are not logged "
        "in",
        "check the spelling; for a private repository run 'hf auth login' or pass `token`",
    ),
}
# Without an answer nobody knows whether the name is that of a repository.
UNANSWERED = (
    errors.OfflineModeIsEnabled,
    errors.LocalEntryNotFoundError,
    errors.RevisionResolutionError,
    httpx2.HTTPError,
)
DISK_FULL = (
    "{repo} cannot be downloaded: the disk is full",
    "free some space, choose another `cache_dir`, or add `low_disk=True`",
)
NOT_WRITABLE = (
    "the Hub cache {cache} cannot be written to: {error}",
    "check its permissions, or choose another `cache_dir`",
)
NO_LOCKS = (
    "the file system of the Hub cache {cache} does not offer locks: {error}",
    "choose a `cache_dir` on a local disk",
)
# What has gone wrong with the cache's own files.
BY_ERRNO: dict[int, tuple[str, str]] = {
    errno.ENOSPC: DISK_FULL,
    errno.EDQUOT: DISK_FULL,
    errno.EACCES: NOT_WRITABLE,
    errno.EPERM: NOT_WRITABLE,
    errno.EROFS: NOT_WRITABLE,
    errno.ENOENT: (
        "a file of the Hub cache {cache} was deleted while it was needed: {error}",
        "let nothing clean the cache meanwhile, and run the same command again",
    ),
    errno.ENOLCK: NO_LOCKS,
    errno.ENOSYS: NO_LOCKS,
    errno.EOPNOTSUPP: NO_LOCKS,
    errno.ESTALE: (
        "the network folder of the Hub cache {cache} has lost a file: {error}",
        "mount the folder again, and run the same command again",
    ),
}
NOT_A_FOLDER = ("the Hub cache {cache} is a file", "choose another `cache_dir`, or correct HF_HUB_CACHE")
# How Xet reports a full disk.
XET_DISK_FULL = f"os error {errno.ENOSPC}"


def _explanation(error: BaseException, cache: Path) -> tuple[str, str]:
    """Message and hint for a known error."""
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if type(error) is errors.HfHubHTTPError and status in (401, 403):
            return TOKEN_REFUSED
        if status == 401 and type(error) in NO_LOGIN:
            return NO_LOGIN[type(error)]
    if isinstance(error, OSError) and error.errno in (errno.ENOTDIR, errno.EEXIST) and cache.is_file():
        return NOT_A_FOLDER
    if isinstance(error, OSError) and error.errno in BY_ERRNO:
        return BY_ERRNO[error.errno]
    if isinstance(error, XetError) and XET_DISK_FULL in str(error):
        return DISK_FULL
    if isinstance(error, httpx2.ConnectError):
        return "the Hub cannot be reached for {repo}: {error}", connection_hint(error)
    return next((message, hint) for kind, message, hint in EXPLANATIONS if isinstance(error, kind))


@contextmanager
def translate_read_errors(
    repo_id: str, revision: str | None, *, folder: str | None = None, cache: Path | None = None
) -> Iterator[None]:
    """Translates read errors of the Hub client.

    Args:
        repo_id: Repository that is read.
        revision: Its revision; ``None`` for the default branch.
        folder: Folder of that name which was looked for and does not exist.
        cache: Folder that downloads go to; ``None`` for the client's own one.

    Raises:
        SourceError: In place of every known error of the client.
    """
    try:
        yield
    except KNOWN as error:
        cause = root_cause(error)
        reason = cause if isinstance(cause, KNOWN) else error
        place = cache or Path(constants.HF_HUB_CACHE)
        message, hint = _explanation(reason, place)
        is_answered = isinstance(reason, errors.HfHubHTTPError) or not isinstance(reason, UNANSWERED)
        values = {"repo": repo_id, "revision": revision or "main", "error": describe(reason), "cache": place}
        hint = hint.format(**values)
        if folder is not None and not is_answered:
            message = f"there is no folder {folder}; {message}"
        raise SourceError(message.format(**values) + ".", hint=hint) from error
