"""What can go wrong with a push: which failures pass by themselves, and what is said about the others."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import httpx2
from huggingface_hub import errors

from hcsmoe_hub.errors import HcsmoeError

Result = TypeVar("Result")

# Pauses before another try, as the client makes them with those requests that it repeats itself.
PAUSES_SECONDS = (1.0, 2.0, 4.0, 8.0)
MAX_PAUSE_SECONDS = 300.0
PASSING_STATUSES = frozenset({408, 429, 500, 502, 503, 504})
PASSING_ERRORS = (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError)
# A proxy's error page is no JSON.
REQUEST_ERRORS = (httpx2.HTTPError, json.JSONDecodeError)
CHANGED_STATUS = 412
FULL_STATUSES = frozenset({402, 413, 507})
FULL_WORDS = ("storage", "quota", "too large")

TOKENS_PAGE = "https://huggingface.co/settings/tokens"
AGAIN = "run the same command again: what the Hub holds already is not sent again"


class PushError(HcsmoeError):
    """A result cannot be pushed, or not as it was asked for."""


def is_passing(error: Exception) -> bool:
    """Whether the same request may well succeed a moment later."""
    if isinstance(error, errors.HfHubHTTPError):
        return error.response.status_code in PASSING_STATUSES
    return isinstance(error, (*PASSING_ERRORS, json.JSONDecodeError))


def patiently(call: Callable[[], Result], *, is_first: bool = False) -> Result:
    """Repeats a request that passing failures meet: the client repeats some requests by itself, but not all.

    Args:
        call: Makes a request that may be made twice without harm.
        is_first: Nothing has come from the Hub yet: if it cannot be reached at all, that is told at once.
    """
    for pause in PAUSES_SECONDS:
        try:
            return call()
        except REQUEST_ERRORS as error:
            if not is_passing(error) or (is_first and isinstance(error, httpx2.ConnectError)):
                raise
            time.sleep(max(pause, min(_asked_pause(error), MAX_PAUSE_SECONDS)))
    return call()


def _asked_pause(error: Exception) -> float:
    """Seconds that the Hub asks to wait."""
    if not isinstance(error, errors.HfHubHTTPError):
        return 0.0
    asked = error.response.headers.get("Retry-After", "")
    return float(asked) if asked.isdecimal() else 0.0


@contextmanager
def explained(repo_id: str, branch: str) -> Iterator[None]:
    """Turns errors of the client into one message each.

    Raises:
        PushError: In place of every error that a request may end with.
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
    """Whether it is a failure of this machine: those of the client are OSErrors as well, but have no number."""
    is_remote = isinstance(error, (httpx2.HTTPError, ConnectionError, TimeoutError))
    return isinstance(error, OSError) and error.errno is not None and not is_remote


def said(error: Exception) -> str:
    """What an error says in one line, without the address that a request went to: it may hold a permission."""
    if isinstance(error, errors.HfHubHTTPError):
        status = f"{error.response.status_code} {error.response.reason_phrase}".strip()
        return f"{status}: {first_line(error.server_message)}" if error.server_message else status
    return first_line(str(error)) or type(error).__name__


def first_line(text: str) -> str:
    """The first line that says something, without its full stop."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else ""


def _explanation(error: Exception, repo_id: str, branch: str) -> tuple[str, str]:
    """Message and hint for an error of the client."""
    if isinstance(error, errors.HfHubHTTPError):
        return _http_explanation(error, repo_id, branch)
    if isinstance(error, httpx2.ConnectError):
        return f"the Hub cannot be reached for {repo_id}: {said(error)}.", f"check the network, or HF_ENDPOINT; {AGAIN}"
    if isinstance(error, PASSING_ERRORS):
        return f"the connection to the Hub was lost on the way to {repo_id}: {said(error)}.", AGAIN
    text = str(error)
    if "README.md" in text:
        lines = [line.strip("- ") for line in text.splitlines() if line.strip()]
        return f"the Hub refuses the front matter of README.md: {lines[-1].rstrip('.')}.", "correct it and push again"
    if any(word in text.lower() for word in FULL_WORDS):
        return _full(repo_id, first_line(text.partition("`")[2]) or said(error))
    return f"{repo_id} cannot be pushed to: {said(error)}.", f"{AGAIN}; HF_HUB_DISABLE_XET=1 sends without Xet"


def _http_explanation(error: errors.HfHubHTTPError, repo_id: str, branch: str) -> tuple[str, str]:
    """Message and hint for an answer of the Hub."""
    status, text = error.response.status_code, said(error)
    if isinstance(error, errors.DisabledRepoError):
        return f"{repo_id} was disabled on the Hub.", "push to another repository"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"there is no repository {repo_id}, or this login may not see it.",
            f"check the spelling, or use a token with access to it: {TOKENS_PAGE}, then 'hf auth login'",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo_id} has no branch {branch}.", "drop --revision, or name a branch"
    if status == 401:
        return f"the Hub refused the access token for {repo_id}.", "run 'hf auth login' again, or pass another --token"
    if status == CHANGED_STATUS:
        return changed(repo_id)
    if status in FULL_STATUSES or (status == 403 and any(word in text.lower() for word in FULL_WORDS)):
        return _full(repo_id, text)
    if status == 403:
        return (
            f"this login may not write to {repo_id}: {text}.",
            f"use a token with write access to it: {TOKENS_PAGE}, then 'hf auth login'; or propose it with --create-pr",
        )
    if status in PASSING_STATUSES:
        return f"the Hub cannot take {repo_id} at the moment: {text}.", AGAIN
    return f"the Hub refuses {repo_id}: {text}.", "look at the message of the Hub, and run the command again"


def changed(repo_id: str) -> tuple[str, str]:
    """Message and hint if someone else was faster."""
    return f"{repo_id} was changed by someone else during the push; nothing was committed.", AGAIN


def _full(repo_id: str, text: str) -> tuple[str, str]:
    return (
        f"the Hub has no room for {repo_id}: {text}.",
        "free some space or get more on https://huggingface.co/settings/billing, then run the same command again",
    )
