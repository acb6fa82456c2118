"""Pointers that a clone without Git LFS holds in place of large files."""

import re

from hcsmoe_hub.errors import SourceError

FIRST_LINE = b"version https://git-lfs.github.com/spec/v1"
# Pointers are shorter than this.
POINTER_BYTES = 1024


def refuse_pointer(start: bytes, *, file: str) -> None:
    """Checks that a file is not a Git LFS pointer.

    Args:
        start: Its first bytes, at least ``POINTER_BYTES`` if it has as many.
        file: Its name in messages.

    Raises:
        SourceError: If it is one.
    """
    if start.startswith(FIRST_LINE):
        size = re.search(rb"^size (\d+)", start, re.MULTILINE)
        stands_for = f" for {int(size[1])} bytes that are not here" if size else ""
        raise SourceError(
            f"{file} is a Git LFS pointer{stands_for}: the repository was cloned without Git LFS.",
            hint="run 'git lfs pull' in the folder, or download the checkpoint with 'hf download'",
        )
