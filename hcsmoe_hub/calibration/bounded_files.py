"""Opens text files for ``datasets`` such that every block is looked at before a parser has it."""

import io
import lzma
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
import pyarrow
import pyarrow.parquet as parquet
from fsspec.implementations.local import LocalFileSystem

from hcsmoe_hub.calibration.bounded_text import Checker, check_file, find_invalid_line
from hcsmoe_hub.calibration.file_types import file_type
from hcsmoe_hub.errors import CalibrationError
from hcsmoe_hub.machine.memory import available_memory

PROTOCOL = "hcsmoe-text"
# Behind the name of a file, so that no library decompresses what has been decompressed here.
_PLAIN = ".plain"
_BUFFER = 1 << 20
# Readers that are given lines.
_OF_LINES = ("json", "csv", "text")
# What compressed files raise that are damaged; pyarrow's errors are among them.
_DAMAGED = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError)
# What is made of a part of a table takes about so many times its size.
_TIMES = 4
# A file that is not JSON Lines is read as a whole once more, up to this size.
_WHOLE = 48_000_000


class _CheckedFile(io.RawIOBase):
    """A file that refuses to give a block with a document that is too long or too deep."""

    def __init__(self, file: BinaryIO, path: Path, reader: str) -> None:
        self._file = file
        self._path = path
        self._reader = reader
        self._checker = Checker(path, reader)
        self._start = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = self._file.read(min(len(buffer), _BUFFER))
        self._checker.feed(block)
        self._start = self._start or block.strip()[:1]
        buffer[: len(block)] = block
        return len(block)

    def readall(self) -> bytes:
        blocks, size = [], 0
        while block := self.read(_BUFFER):
            blocks.append(block)
            size += len(block)
            # The checker bounds lists.
            if size > _WHOLE and self._reader == "json" and self._start != b"[":
                raise _not_lines(self._path)
        return b"".join(blocks)

    def close(self) -> None:
        self._file.close()
        super().close()


def _not_lines(path: Path) -> CalibrationError:
    with open_plain(path) as file:
        invalid = find_invalid_line(file, path)
    return invalid or CalibrationError(
        f"{path} cannot be read: its lines are JSON, but a key has values of kinds that do not fit together.",
        hint="give every key values of one kind, or leave out the keys that are not text",
    )


class BoundedFiles(LocalFileSystem):
    """Files of this machine, decompressed and checked; each is named by ``address``."""

    protocol = (PROTOCOL,)

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        plain = "/" + str(path).removeprefix(f"{PROTOCOL}://").removesuffix(_PLAIN).lstrip("/")
        return LocalFileSystem._strip_protocol(plain)

    def glob(self, path: str, **settings: Any) -> Any:
        """The one file of this name, whatever characters it has."""
        plain = self._strip_protocol(path)
        found = {f"{PROTOCOL}://{plain}{_PLAIN}": self.info(plain)}
        return found if settings.get("detail") else list(found)

    def _open(self, path: str, mode: str = "rb", **settings: Any) -> Any:
        assert mode == "rb", "files are only read"
        kind = file_type(Path(path))
        assert kind is not None, "the plan refuses files of unknown types"
        return io.BufferedReader(_CheckedFile(open_plain(Path(path)), Path(path), kind.reader), _BUFFER)


def register() -> None:
    """Teaches fsspec these files, and the compressions that pyarrow has and Python lacks."""
    fsspec.register_implementation(PROTOCOL, BoundedFiles, clobber=True)

    def reader(codec: str, file: Any, mode: str = "rb", **_: Any) -> Any:
        return pyarrow.CompressedInputStream(file, codec)

    for codec, ending in (("zstd", "zst"), ("lz4", "lz4")):
        if codec not in fsspec.available_compressions():
            fsspec.compression.register_compression(codec, partial(reader, codec), ending)


def open_plain(path: Path) -> BinaryIO:
    """Opens a file, decompressed as its name says."""
    return cast(BinaryIO, fsspec.open(str(path), "rb", compression="infer").open())


def address(path: Path, reader: str) -> str | None:
    """What ``datasets`` calls a file that is checked while it is read; ``None`` for files that are checked before."""
    is_read = reader in _OF_LINES and path.suffix.lower() != ".zip"
    return f"{PROTOCOL}://{path.absolute().as_posix()}{_PLAIN}" if is_read else None


def _check_row_groups(path: Path) -> None:
    """Checks that memory has room for each part of a table that is read at once, by what the file says of itself."""
    most = available_memory() // _TIMES
    described = parquet.read_metadata(path)
    for number in range(described.num_row_groups):
        size = described.row_group(number).total_byte_size
        if size > most:
            raise CalibrationError(
                f"{path} cannot be read: its row group {number} has {size} bytes, too many for this machine.",
                hint="write it with smaller row groups",
            )


def check_before(path: Path) -> None:
    """Looks at a whole file that is not checked while it is read.

    Raises:
        CalibrationError: If a document in it is too long or nested too deeply, or a part of a table is too large.
    """
    kind = file_type(path)
    if kind is not None and kind.reader == "parquet" and path.suffix.lower() == ".parquet":
        _check_row_groups(path)
    if kind is None or kind.reader not in _OF_LINES:
        return
    check: Callable[[BinaryIO], None] = partial(check_file, path=path, reader=kind.reader)
    if path.suffix.lower() == ".zip":
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                with archive.open(name) as member:
                    check(cast(BinaryIO, member))
        return
    with open_plain(path) as file:
        check(file)


def invalid_line(paths: list[Path]) -> CalibrationError | None:
    """The first line of files of JSON Lines that is not JSON; ``None`` if there is none."""
    for path in paths:
        kind = file_type(path)
        if kind is not None and kind.reader == "json" and path.suffix.lower() != ".zip":
            try:
                with open_plain(path) as file:
                    found = find_invalid_line(file, path)
            except _DAMAGED:
                # The reader has failed at the same place, and says why.
                continue
            if found is not None:
                return found
    return None
