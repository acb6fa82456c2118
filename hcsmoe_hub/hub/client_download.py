"""Downloads whole shards with the Hub's client, into its cache and by its rules, with Xet where the Hub offers it.

The client continues a download within one call, but not in the next process: it keeps whole files only, because locks
do not hold on every shared file system.
"""

import os
from collections.abc import Collection
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from threading import Event
from typing import Any

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.utils import tqdm
from huggingface_hub.utils._xet import abort_xet_session

from hcsmoe_hub.errors import SourceError
from hcsmoe_hub.hub.errors import Stopped, XetError
from hcsmoe_hub.hub.retry import with_retries

# What the client calls its progress bar for a download over Xet.
XET_BAR = "huggingface_hub.xet_get"
OPEN_FILES = Path("/proc/self/fd")


def download_file(
    repo_id: str, file: str, *, revision: str | None, token: str | None, cache: Path, stop: Event | None = None
) -> Path:
    """Downloads a file unless the cache holds it.

    Args:
        repo_id: Repository.
        file: Name of the file.
        revision: Commit.
        token: Access token; ``None`` uses the stored login.
        cache: Folder of the cache.
        stop: Ends a plain HTTP download when set by another thread, after at most 10 MiB more; see ``abort_xet``.

    Returns:
        Its path in the cache.

    Raises:
        Stopped: If ``stop`` was set.
        XetError: If Xet fails.
        HTTPError, OSError: As the client raises them.
    """
    ended = stop or Event()

    def download() -> Path:
        if ended.is_set():
            raise Stopped
        try:
            return Path(
                huggingface_hub.hf_hub_download(
                    repo_id, file, revision=revision, token=token, cache_dir=cache, tqdm_class=_bar(ended)
                )
            )
        # Xet raises nothing more specific.
        except RuntimeError as error:
            if ended.is_set():
                raise Stopped from None
            raise XetError(str(error)) from error

    return with_retries(download)


def _bar(stop: Event) -> type[tqdm]:
    """A progress bar that shows nothing, and through which a download can be ended."""

    class Bar(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            # An error would not end a download over Xet, but be printed.
            self._can_raise = options.get("name") != XET_BAR
            super().__init__(*arguments, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> None:
            if stop.is_set() and self._can_raise:
                raise Stopped

    return Bar


def abort_xet() -> None:
    """Ends every download over Xet in this process at once, as the client itself does when it is interrupted."""
    abort_xet_session()


def remove_unfinished(blobs: Path, names: Collection[str]) -> None:
    """Deletes what downloads that are still running have written, because the process may end before they do.

    Files of other processes are not touched: only Linux lists the open files of a process, so only there is anything
    deleted.

    Args:
        blobs: Folder of the cache that files are downloaded to.
        names: Names that the files would get.
    """
    if not OPEN_FILES.is_dir():
        return
    for link in OPEN_FILES.iterdir():
        # It may be closed meanwhile.
        with suppress(OSError):
            path = Path(os.readlink(link))
            if path.parent == blobs and path.suffix == ".incomplete" and path.name.split(".")[0] in names:
                path.unlink()


def check_size(repo_id: str, shard: str, nbytes: int) -> None:
    """Checks that the client can download a shard at all.

    Raises:
        SourceError: If it is too large to be downloaded without Xet.
    """
    if nbytes > constants.MAX_HTTP_DOWNLOAD_SIZE and (constants.HF_HUB_DISABLE_XET or find_spec("hf_xet") is None):
        raise SourceError(
            f"{shard} of {repo_id} has {nbytes} bytes, and the Hub sends files of more than "
            f"{constants.MAX_HTTP_DOWNLOAD_SIZE} bytes over Xet only.",
            hint="run 'pip install hf_xet' and unset HF_HUB_DISABLE_XET, or add `low_disk=True`",
        )
