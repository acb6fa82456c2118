"""Downloads a byte range of a remote file, and resumes a download that this process or an earlier one began.

Only ``low_disk`` needs this: it keeps no whole shards, and the Hub's client downloads nothing else.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import Self

import httpx2
from huggingface_hub import constants
from huggingface_hub.utils import get_session, hf_raise_for_status

from hcsmoe_hub.hub import retry
from hcsmoe_hub.hub.errors import ForeignAnswer, Stopped

# Content delivery networks refuse to send more than 50 GB per request.
MAX_REQUEST_BYTES = 10_000_000_000
# A hash of each block of a file is kept next to it.
BLOCK_BYTES = 1 << 20
SUMS = ".sums"
# In hexadecimal digits, with the end of the line.
SUM_BYTES = 65


@dataclass(frozen=True, slots=True, kw_only=True)
class Remote:
    """A remote file.

    Attributes:
        url: Its address; redirects are followed.
        headers: Sent with every request, such as a token.
        size: Its size in bytes.
        etag: Its hash, as the Hub names it; empty if unknown.
    """

    url: str
    headers: Mapping[str, str]
    size: int
    etag: str = ""


class PartFile:
    """A local file that is filled from its start.

    Bytes are written to their positions, never appended: should two processes write to one file after all, they write
    the same bytes to the same places. The hashes of complete blocks are kept in a second file; what an earlier process
    has left counts as far as they agree.

    Args:
        path: Its path; the folder exists.
        nbytes: Its size when it is complete.
    """

    def __init__(self, path: Path, nbytes: int) -> None:
        self._nbytes = nbytes
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._sums = os.open(sums_of(path), os.O_RDWR | os.O_CREAT, 0o644)
        self.filled = self._agreeing_bytes()
        self._hash = sha256()

    def _agreeing_bytes(self) -> int:
        """Bytes in blocks that have the hashes which were kept."""
        for start in range(0, self._nbytes, BLOCK_BYTES):
            size = min(BLOCK_BYTES, self._nbytes - start)
            kept = os.pread(self._sums, SUM_BYTES, start // BLOCK_BYTES * SUM_BYTES)
            if kept != _line(sha256(os.pread(self._file, size, start)).hexdigest()):
                return start
        return self._nbytes

    def write(self, content: bytes) -> None:
        """Adds bytes to the end of what is there.

        Raises:
            OSError: If they cannot be written.
        """
        view = memoryview(content)
        while view:
            block = view[: BLOCK_BYTES - self.filled % BLOCK_BYTES]
            count = os.pwrite(self._file, block, self.filled)
            self._hash.update(block[:count])
            self.filled += count
            if self.filled % BLOCK_BYTES == 0 or self.filled == self._nbytes:
                number = (self.filled - 1) // BLOCK_BYTES
                os.pwrite(self._sums, _line(self._hash.hexdigest()), number * SUM_BYTES)
                self._hash = sha256()
            view = view[count:]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            # It may have been left by a run that wanted more of the shard.
            os.ftruncate(self._file, self._nbytes)
        os.close(self._file)
        os.close(self._sums)


def _line(digest: str) -> bytes:
    return f"{digest}\n".encode()


def sums_of(path: Path) -> Path:
    """File of the hashes of a file's blocks."""
    return path.with_name(path.name + SUMS)


def receive(remote: Remote, path: Path, *, start: int, end: int, stop: Event) -> None:
    """Fills ``path`` with the bytes from ``start`` up to ``end``; bytes that it already holds are not requested again.

    Args:
        remote: The remote file.
        path: The local file; its folder exists.
        start: First byte of the range.
        end: The byte after the last one.
        stop: Ends the download when set by another thread.

    Raises:
        Stopped: If ``stop`` was set.
        ForeignAnswer: If an answer is not about the file.
        HTTPError: If the server refuses, or keeps failing without sending anything.
        OSError: If the file cannot be written.
    """
    pauses = iter(retry.PAUSES_SECONDS)
    with PartFile(path, end - start) as part:
        while (position := start + part.filled) < end:
            try:
                _request(remote, part, position, min(end, position + MAX_REQUEST_BYTES), stop)
            except retry.REQUEST_ERRORS as error:
                if start + part.filled > position:
                    pauses = iter(retry.PAUSES_SECONDS)
                pause = next(pauses, None)
                if pause is None or not retry.is_transient(error):
                    raise
                if stop.wait(max(pause, retry.retry_after(error))):
                    raise Stopped from None


def _request(remote: Remote, part: PartFile, position: int, end: int, stop: Event) -> None:
    """Makes one request and adds the response to the file."""
    # Positions count stored bytes, so the response must not be compressed.
    headers = {**remote.headers, "Range": f"bytes={position}-{end - 1}", "Accept-Encoding": "identity"}
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream("GET", remote.url, headers=headers, timeout=timeout, follow_redirects=True) as response:
        hf_raise_for_status(response)
        check_answer(response, remote, position)
        # A mirror may ignore the range and answer with the whole file.
        before, missing = (0 if response.status_code == 206 else position), end - position
        for block in response.iter_bytes():
            if stop.is_set():
                raise Stopped
            wanted = block[before : before + missing]
            before -= min(before, len(block))
            part.write(wanted)
            missing -= len(wanted)
            if not missing:
                return
    raise httpx2.RemoteProtocolError(f"the response ended {missing} bytes early")


def check_answer(response: httpx2.Response, remote: Remote, position: int) -> None:
    """Checks what an answer says about the file that it is from; it need not say everything.

    Args:
        response: The answer to a request for a range, after redirects.
        remote: The requested file.
        position: First byte of the range.

    Raises:
        ForeignAnswer: If it is from another file or another version of it, or not from the Hub.
    """
    found = response.headers.get("Content-Type", "")
    if found.startswith("text/html"):
        raise ForeignAnswer(f"it is a page ({found}), not a file")
    if response.status_code == 206:
        answered = response.headers.get("Content-Range", "")
        first, _, size = answered.removeprefix("bytes ").partition("/")
        is_right = first.partition("-")[0] == str(position) and size in (str(remote.size), "*")
    else:
        answered = response.headers.get("Content-Length", str(remote.size))
        is_right = answered == str(remote.size)
    if not is_right:
        raise ForeignAnswer(f"it has the range {answered!r} of a file of {remote.size} bytes")
    # Of a large file, only the Hub's own answer, a redirect, names the hash; storage has entity tags of its own.
    for answer in (*response.history, response):
        headers = answer.headers
        etag = headers.get("X-Linked-ETag") or (headers.get("ETag") if "X-Repo-Commit" in headers else None)
        if etag and remote.etag and etag.removeprefix("W/").strip('"') != remote.etag:
            raise ForeignAnswer(f"it is about {etag}, not about {remote.etag}")
