"""Files of a commit, and how many bytes of them have been sent."""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from huggingface_hub import CommitOperationAdd
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.lfs import UploadInfo
from huggingface_hub.utils.sha import git_hash

# A file of a repository as the Hub lists it: path, size, and hashes.
RemoteFile = RepoFile


class _CountedFile(io.BufferedReader):
    """A file that counts the bytes read from it."""

    def __init__(self, path: Path, count: Callable[[int], None]) -> None:
        super().__init__(io.FileIO(path))
        self._count = count

    def read(self, size: int | None = -1, /) -> bytes:
        content = super().read(size)
        self._count(len(content))
        return content


class Addition(CommitOperationAdd):
    """One file of a commit.

    Args:
        path: The file.
        name: Its path in the repository.
        count: Called with the size of every block that is sent.
    """

    def __init__(self, path: Path, name: str, count: Callable[[int], None]) -> None:
        super().__init__(path_in_repo=name, path_or_fileobj=str(path))
        self.path = path
        self.bytes_sent = 0
        self._count = count

    @property
    def size(self) -> int:
        """Size of the file in bytes."""
        size: int = self.upload_info.size
        return size

    @property
    def is_uploaded(self) -> bool:
        """Whether the Hub has the content, so that the local file is no longer needed."""
        # The client drops the content of a file that it has uploaded; a small one is sent with the commit itself.
        return self.size > 0 and self.path_or_fileobj == b""

    def moved(self, path: Path) -> None:
        """Called when the file has another path."""
        self.path = path
        if not self.is_uploaded:
            self.path_or_fileobj = str(path)

    @contextmanager
    def as_file(self, with_tqdm: bool = False) -> Iterator[BinaryIO]:
        """Opens the content for the client, which asks for a progress bar only when it sends the file."""
        if with_tqdm and not self.is_uploaded:
            with _CountedFile(self.path, self._sent) as file:
                yield file
        else:
            with super().as_file() as file:
                yield file

    def _sent(self, count: int) -> None:
        self.bytes_sent += count
        self._count(count)

    def matches(self, remote: RemoteFile | None) -> bool:
        """Whether a file of the repository has the same content."""
        if remote is None or remote.size != self.size:
            return False
        if remote.lfs is not None:
            return bool(remote.lfs.sha256 == self.upload_info.sha256.hex())
        return not self.is_uploaded and bool(remote.blob_id == git_hash(self.path.read_bytes()))


class EarlierAddition(Addition):
    """A file that an earlier process has uploaded, and whose content is no longer here.

    Args:
        path: Where it was.
        name: Its path in the repository.
        size: Its size in bytes.
        sha256: Hash of its content, in hexadecimal.
        sample: Its first bytes.
    """

    def __init__(self, path: Path, name: str, *, size: int, sha256: str, sample: bytes) -> None:
        CommitOperationAdd.__init__(self, path_in_repo=name, path_or_fileobj=b"")
        self.path = path
        self.bytes_sent = 0
        self.upload_info = UploadInfo(size=size, sample=sample, sha256=bytes.fromhex(sha256))
        # As the client leaves what it has uploaded: otherwise it would send the empty content.
        self._upload_mode = "lfs"
        self._is_uploaded = True

    def compare(self, remote: RemoteFile | None) -> None:
        """Takes down what the repository has under this name, so that the same content is not committed again."""
        if remote is not None and remote.lfs is not None:
            self._remote_oid = remote.lfs.sha256
