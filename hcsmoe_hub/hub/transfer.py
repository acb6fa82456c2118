"""Brings a stretch of a remote file to this machine; goes on where it broke off, in this process or an earlier one.

The client's own downloads begin anew in every process, and cannot be stopped.
"""

from collections.abc import Mapping
from pathlib import Path
from threading import Event

import httpx2
from huggingface_hub import constants
from huggingface_hub.utils import get_session, hf_raise_for_status

from hcsmoe_hub.hub import retry

# Content delivery networks refuse to send more than 50 GB at once.
MAX_REQUEST_BYTES = 10_000_000_000


class Stopped(Exception):
    """Nobody waits for a download any more."""


def receive(url: str, path: Path, *, start: int, end: int, headers: Mapping[str, str], stop: Event) -> None:
    """Fills ``path`` with the bytes from ``start`` up to ``end``; what it holds already is not asked for again.

    Args:
        url: The remote file; it may lead elsewhere.
        path: The local file; its folder exists.
        start: First byte of the stretch.
        end: The byte after the last one.
        headers: What every request bears, such as a token.
        stop: Ends the download from another thread.

    Raises:
        Stopped: If that happened.
        HTTPError: If the server refuses, or keeps failing without sending anything.
        OSError: If the disk fails.
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
            if pause is None or not retry.is_passing(error):
                raise
            if stop.wait(max(pause, retry.retry_after(error))):
                raise Stopped from None


def _append(url: str, path: Path, position: int, end: int, headers: Mapping[str, str], stop: Event) -> None:
    """Makes one request, and appends what it is answered."""
    # Bytes are counted as they are stored, so nothing may be compressed on the way.
    asked = {**headers, "Range": f"bytes={position}-{end - 1}", "Accept-Encoding": "identity"}
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with (
        path.open("ab") as file,
        get_session().stream("GET", url, headers=asked, timeout=timeout, follow_redirects=True) as response,
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
    raise httpx2.RemoteProtocolError(f"the answer ended {missing} bytes too early")
