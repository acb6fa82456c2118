"""User-facing messages and hints for Hub write errors."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import httpx2
from huggingface_hub import errors

from hcsmoe_hub.errors import HcsmoeError
from hcsmoe_hub.hub.retry import REQUEST_ERRORS, TRANSIENT_ERRORS, TRANSIENT_STATUSES, describe, first_line
from hcsmoe_hub.hub.session import connection_hint

CHANGED_STATUS = 412
FULL_STATUSES = frozenset({402, 413, 507})
# Of a commit that names content which was never uploaded, or was removed since.
MISSING_STATUSES = frozenset({400, 404, 409, 422})
FULL_WORDS = ("storage", "quota", "too large")

TOKENS_PAGE = "https://huggingface.co/settings/tokens"
RESUME_HINT = "run the same command again: files that the Hub already has are not sent again"


class PushError(HcsmoeError):
    """A result cannot be pushed as requested."""


@contextmanager
def translate_write_errors(repo_id: str, branch: str) -> Iterator[None]:
    """Translates write errors of the Hub client; errors of the local file system pass through.

    Raises:
        PushError: In place of every error of a request.
    """
    try:
        yield
    # The client wraps failed uploads in RuntimeError, and refusals of single files in ValueError.
    except (*REQUEST_ERRORS, RuntimeError, ValueError, OSError) as error:
        reason = error.__cause__ if isinstance(error, RuntimeError) and isinstance(error.__cause__, OSError) else error
        if _is_local(reason):
            raise reason from None
        message, hint = _explanation(reason, repo_id, branch)
        raise PushError(message, hint=hint) from error


def _is_local(error: Exception) -> bool:
    """Whether an error comes from the local file system; the client's own OSErrors have no error number."""
    is_remote = isinstance(error, (httpx2.HTTPError, ConnectionError, TimeoutError))
    return isinstance(error, OSError) and error.errno is not None and not is_remote


def _explanation(error: Exception, repo_id: str, branch: str) -> tuple[str, str]:
    """Message and hint for an error of the client."""
    if isinstance(error, errors.HfHubHTTPError):
        return _http_explanation(error, repo_id, branch)
    if isinstance(error, httpx2.ConnectError):
        return (
            f"the Hub cannot be reached for {repo_id}: {describe(error)}.",
            f"{connection_hint(error)}; {RESUME_HINT}",
        )
    if isinstance(error, TRANSIENT_ERRORS):
        return f"the connection to the Hub was lost during the push to {repo_id}: {describe(error)}.", RESUME_HINT
    text = str(error)
    if "README.md" in text:
        lines = [line.strip("- ") for line in text.splitlines() if line.strip()]
        return f"the Hub rejects the front matter of README.md: {lines[-1].rstrip('.')}.", "correct it and push again"
    if any(word in text.lower() for word in FULL_WORDS):
        return _full(repo_id, first_line(text.partition("`")[2]) or describe(error))
    return f"the push to {repo_id} failed: {describe(error)}.", f"{RESUME_HINT}; HF_HUB_DISABLE_XET=1 sends without Xet"


def _http_explanation(error: errors.HfHubHTTPError, repo_id: str, branch: str) -> tuple[str, str]:
    """Message and hint for an HTTP error of the Hub."""
    status, text = error.response.status_code, describe(error)
    if isinstance(error, errors.DisabledRepoError):
        return f"{repo_id} was disabled on the Hub.", "push to another repository"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{repo_id} does not exist on the Hub, or this login cannot see it.",
            f"check the spelling, or use a token with access to it: {TOKENS_PAGE}, then 'hf auth login'",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo_id} has no branch {branch}.", "drop `revision`, or name a branch"
    if status == 401:
        return f"the Hub refused the access token for {repo_id}.", "run 'hf auth login' again, or pass another `token`"
    if status == CHANGED_STATUS:
        return changed_meanwhile(repo_id)
    if status in FULL_STATUSES or (status == 403 and any(word in text.lower() for word in FULL_WORDS)):
        return _full(repo_id, text)
    if status == 403:
        return (
            f"this login cannot write to {repo_id}: {text}.",
            f"use a token with write access: {TOKENS_PAGE}, then 'hf auth login'; or open a pull request with "
            "`create_pr=True`",
        )
    if status in TRANSIENT_STATUSES:
        return f"the Hub is temporarily unable to accept {repo_id}: {text}.", RESUME_HINT
    return f"the Hub rejects {repo_id}: {text}.", "follow the Hub's message, and run the command again"


def changed_meanwhile(repo_id: str) -> tuple[str, str]:
    """Message and hint for a branch that moved during the push."""
    return f"{repo_id} was changed by someone else during the push; nothing was committed.", RESUME_HINT


def misses_content(error: Exception, names: Sequence[str]) -> bool:
    """Whether the Hub refuses a commit because it does not have the content of large files.

    Args:
        error: The refusal.
        names: Files that were uploaded earlier.
    """
    if not isinstance(error, errors.HfHubHTTPError) or error.response.status_code not in MISSING_STATUSES:
        return False
    text = f"{error} {error.server_message}"
    return "lfs pointer" in text.lower() or any(name in text for name in names)


def lost_meanwhile(repo_id: str, names: Sequence[str]) -> PushError:
    """What is wrong if the Hub has lost files whose content is no longer here.

    Args:
        repo_id: The repository.
        names: One of them, or several that may be lost.
    """
    others = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return PushError(
        f"{repo_id} no longer has what was uploaded of {names[0]}{others}, and it was deleted here.",
        hint="begin anew with `restart=True`",
    )


def _full(repo_id: str, text: str) -> tuple[str, str]:
    return (
        f"not enough storage on the Hub for {repo_id}: {text}.",
        "free some space or get more on https://huggingface.co/settings/billing, then run the same command again",
    )
