"""Zip archives of somebody else: the list of members is looked at before it is read."""

import zipfile
from pathlib import Path

# Lists of a hundred thousand members.
MAX_DIRECTORY_BYTES = 16_000_000
# The end of an archive with a comment of any length, and what archives beyond 4 GiB have before it.
_END_BYTES = 22 + 65_536 + 76
_END, _END_64 = b"PK\5\6", b"PK\6\6"


def check_directory(path: Path) -> None:
    """Checks that an archive does not have more members than memory is well spent on.

    Raises:
        zipfile.BadZipFile: If it has, or does not end as an archive.
        OSError: If it cannot be read.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _END_BYTES))
        tail = file.read()
    place, place_64 = tail.rfind(_END), tail.rfind(_END_64)
    if place < 0:
        raise zipfile.BadZipFile("it does not end as a zip archive")
    listed = int.from_bytes(tail[place + 12 : place + 16], "little")
    if listed == 0xFFFFFFFF and place_64 >= 0:
        listed = int.from_bytes(tail[place_64 + 40 : place_64 + 48], "little")
    if listed > MAX_DIRECTORY_BYTES:
        raise zipfile.BadZipFile(f"its list of members has {listed} bytes, more than {MAX_DIRECTORY_BYTES}")
