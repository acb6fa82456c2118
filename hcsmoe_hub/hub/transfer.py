"""Downloads a byte range of a remote file, and resumes a download that this process or an earlier one began.

The client's own downloads start over in every process, and cannot be stopped.
"""

from collections.abc import Mapping
from pathlib import Path
from threading import Event

import httpx2
from huggingface_hub import constants
from huggingface_hub.utils import get_session, hf_raise_for_status

from hcsmoe_hub.hub import retry

# Content delivery networks refuse to send more than 50 GB per request.
MAX_REQUEST_BYTES = 10_000_000_000


class Stopped(Exception):
    """A download was stopped because its result is no longer needed."""


def receive(url: str, path: Path, *, start: int, end: int, headers: Mapping[str, str], stop: Event) -> None:
    """Fills ``path`` with the bytes from ``start`` up to ``end``; bytes that it already holds are not requested again.

    Args:
        url: The remote file; redirects are followed.
        path: The local file; its folder exists.
        start: First byte of the range.
        end: The byte after the last one.
        headers: Sent with every request, such as a token.
        stop: Ends the download when set by another thread.

    Raises:
        Stopped: If ``stop`` was set.
        HTTPError: If the server refuses, or keeps failing without sending anything.
        OSError: If the file cannot be written.
    """
    if path.exists() and path.stat().st_size > end - start:
        path.unlink()
    path.touch()
    pauses = iter(retry.PAUSES_SECONDS)
    while (position := start + path.stat().st_size) < end:
        try:
            _append(url, path, position, min(end, position + MAX_REQUEST_BYTES), headers, stop)
        except retry.REQUEST_ERRORS as error:
            if start + path.stat().st_size > position:
                pauses = iter(retry.PAUSES_SECONDS)
            pause = next(pauses, None)
            if pause is None or not retry.is_transient(error):
                raise
            if stop.wait(max(pause, retry.retry_after(error))):
                raise Stopped from None


def _append(url: str, path: Path, position: int, end: int, headers: Mapping[str, str], stop: Event) -> None:
    """Makes one request and appends the response."""
    # Positions count stored bytes, so the response must not be compressed.
    range_headers = {**headers, "Range": f"bytes={position}-{end - 1}", "Accept-Encoding": "identity"}
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with (
        path.open("ab") as file,
        get_session().stream("GET", url, headers=range_headers, timeout=timeout, follow_redirects=True) as response,
    ):
        hf_raise_for_status(response)
        # A mirror may ignore the range and answer with the whole file.
        before, missing = (0 if response.status_code == 206 else position), end - position
        for block in response.iter_bytes():
            if stop.is_set():
                raise Stopped
            wanted = block[before : before + missing]
            before -= min(before, len(block))
            missing -= file.write(wanted)
            if not missing:
                return
    raise httpx2.RemoteProtocolError(f"the response ended {missing} bytes early")
