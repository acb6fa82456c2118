"""What can go wrong with any request to the Hub: which failures pass by themselves, and what the others say."""

import json
import time
from collections.abc import Callable
from typing import TypeVar

import httpx2
from huggingface_hub import errors

Result = TypeVar("Result")

# Pauses before another try, as the client makes them with those requests that it repeats itself.
PAUSES_SECONDS = (1.0, 2.0, 4.0, 8.0)
MAX_PAUSE_SECONDS = 300.0
PASSING_STATUSES = frozenset({408, 429, 500, 502, 503, 504})
PASSING_ERRORS = (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError)
# A proxy's error page is no JSON.
REQUEST_ERRORS = (httpx2.HTTPError, json.JSONDecodeError)
# The client wraps the real reason in these when it finds nothing in the cache to fall back on.
WRAPPERS = (errors.LocalEntryNotFoundError, errors.RevisionResolutionError)


def root_cause(error: Exception) -> Exception:
    """What the client met, where it tells of something else that failed because of it."""
    cause = error.__cause__
    return cause if isinstance(error, WRAPPERS) and isinstance(cause, Exception) else error


def is_passing(error: Exception) -> bool:
    """Whether the same request may well succeed a moment later."""
    reason = root_cause(error)
    if isinstance(reason, errors.HfHubHTTPError):
        return reason.response.status_code in PASSING_STATUSES
    return isinstance(reason, (*PASSING_ERRORS, json.JSONDecodeError))


def with_retries(call: Callable[[], Result], *, is_first: bool = False) -> Result:
    """Repeats a request that passing failures meet: the client repeats some requests by itself, but not all.

    Args:
        call: Makes a request that may be made twice without harm.
        is_first: Nothing has come from the Hub yet: if it cannot be reached at all, that is told at once.
    """
    for pause in PAUSES_SECONDS:
        try:
            return call()
        except (*REQUEST_ERRORS, *WRAPPERS) as error:
            if not is_passing(error) or (is_first and isinstance(root_cause(error), httpx2.ConnectError)):
                raise
            time.sleep(max(pause, retry_after(error)))
    return call()


def retry_after(error: Exception) -> float:
    """Seconds that the Hub asks to wait, within reason."""
    reason = root_cause(error)
    if not isinstance(reason, errors.HfHubHTTPError):
        return 0.0
    asked = reason.response.headers.get("Retry-After", "")
    return min(float(asked), MAX_PAUSE_SECONDS) if asked.isdecimal() else 0.0


def describe(error: Exception) -> str:
    """What an error says in one line, without the address that a request went to: it may hold a permission."""
    if isinstance(error, errors.HfHubHTTPError):
        status = f"{error.response.status_code} {error.response.reason_phrase}".strip()
        return f"{status}: {first_line(error.server_message)}" if error.server_message else status
    return first_line(str(error)) or type(error).__name__


def first_line(text: str) -> str:
    """The first line that says something, without its full stop."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else ""
