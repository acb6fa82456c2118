"""Retries Hub requests after transient errors, and describes any error in one line."""

import json
import time
from collections.abc import Callable
from typing import TypeVar

import httpx2
from huggingface_hub import errors

Result = TypeVar("Result")

# The pauses that the client itself makes between its retries.
PAUSES_SECONDS = (1.0, 2.0, 4.0, 8.0)
MAX_PAUSE_SECONDS = 300.0
TRANSIENT_STATUSES = frozenset({408, 429, 500, 502, 503, 504})
TRANSIENT_ERRORS = (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError)
# A proxy's error page is not JSON.
REQUEST_ERRORS = (httpx2.HTTPError, json.JSONDecodeError)
# The client wraps the original error in these when the cache has nothing to fall back on.
WRAPPERS = (errors.LocalEntryNotFoundError, errors.RevisionResolutionError)


def root_cause(error: Exception) -> Exception:
    """The original error behind one of the client's wrappers; any other error as it is."""
    cause = error.__cause__
    return cause if isinstance(error, WRAPPERS) and isinstance(cause, Exception) else error


def is_transient(error: Exception) -> bool:
    """Whether an error is transient, so that the same request may succeed a moment later."""
    reason = root_cause(error)
    if isinstance(reason, errors.HfHubHTTPError):
        return reason.response.status_code in TRANSIENT_STATUSES
    return isinstance(reason, (*TRANSIENT_ERRORS, json.JSONDecodeError))


def with_retries(call: Callable[[], Result], *, is_first: bool = False) -> Result:
    """Retries a request after transient errors; the client itself retries only some requests.

    Args:
        call: Makes an idempotent request.
        is_first: Whether it is the first request to the Hub: then a failure to connect is raised at once.
    """
    for pause in PAUSES_SECONDS:
        try:
            return call()
        except (*REQUEST_ERRORS, *WRAPPERS) as error:
            if not is_transient(error) or (is_first and isinstance(root_cause(error), httpx2.ConnectError)):
                raise
            time.sleep(max(pause, retry_after(error)))
    return call()


def retry_after(error: Exception) -> float:
    """Seconds to wait as the Hub's ``Retry-After`` asks, at most ``MAX_PAUSE_SECONDS``; 0 without that header."""
    reason = root_cause(error)
    if not isinstance(reason, errors.HfHubHTTPError):
        return 0.0
    seconds = reason.response.headers.get("Retry-After", "")
    return min(float(seconds), MAX_PAUSE_SECONDS) if seconds.isdecimal() else 0.0


def describe(error: Exception) -> str:
    """One-line description of an error, without the URL of the request, which may contain a signature."""
    if isinstance(error, errors.HfHubHTTPError):
        status = f"{error.response.status_code} {error.response.reason_phrase}".strip()
        return f"{status}: {first_line(error.server_message)}" if error.server_message else status
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{f' ({error.filename})' if error.filename else ''}"
    # Xet adds the address.
    return first_line(str(error).partition(", domain:")[0]) or type(error).__name__


def first_line(text: str) -> str:
    """The first line that is not blank, without its full stop."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else ""
