"""User-facing messages and hints for Hub read errors."""

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2
from huggingface_hub import errors

from hcsmoe_hub.errors import SourceError
from hcsmoe_hub.hub.retry import describe, root_cause
from hcsmoe_hub.hub.session import proxy_variables

# Most specific first: GatedRepoError is a RepositoryNotFoundError, most are HfHubHTTPErrors, and those are OSErrors.
EXPLANATIONS: tuple[tuple[type[Exception], str, str], ...] = (
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
KNOWN = tuple(kind for kind, _, _ in EXPLANATIONS)
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


def _explanation(error: BaseException) -> tuple[str, str]:
    """Message and hint for a known error."""
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if type(error) is errors.HfHubHTTPError and status in (401, 403):
            return TOKEN_REFUSED
        if status == 401 and type(error) in NO_LOGIN:
            return NO_LOGIN[type(error)]
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return DISK_FULL
    if isinstance(error, httpx2.ConnectError):
        return "the Hub cannot be reached for {repo}: {error}", _connection_hint(error)
    return next((message, hint) for kind, message, hint in EXPLANATIONS if isinstance(error, kind))


def _connection_hint(error: httpx2.ConnectError) -> str:
    """What to do if no connection is made."""
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return "if a proxy signs connections itself, point SSL_CERT_FILE to its certificate"
    proxies = proxy_variables()
    return f"check the network, {f'the proxy of {proxies}, ' if proxies else ''}or HF_ENDPOINT"


@contextmanager
def translate_read_errors(repo_id: str, revision: str | None, *, folder: str | None = None) -> Iterator[None]:
    """Translates read errors of the Hub client.

    Args:
        repo_id: Repository that is read.
        revision: Its revision; ``None`` for the default branch.
        folder: Folder of that name which was looked for and does not exist.

    Raises:
        SourceError: In place of every known error of the client.
    """
    try:
        yield
    except KNOWN as error:
        cause = root_cause(error)
        reason = cause if isinstance(cause, KNOWN) else error
        message, hint = _explanation(reason)
        is_answered = isinstance(reason, errors.HfHubHTTPError) or not isinstance(reason, UNANSWERED)
        values = {"repo": repo_id, "revision": revision or "main", "error": describe(reason)}
        hint = hint.format(**values)
        if folder is not None and not is_answered:
            message = f"there is no folder {folder}; {message}"
        raise SourceError(message.format(**values) + ".", hint=hint) from error
