"""Which process writes to a folder: one at a time, also where ``flock`` lets everybody in.

A lock that the system holds ends with its process, but some shared file systems grant it to everyone, or to one process
of every machine. A file with the name of the owner is there as well, which a killed process leaves behind.
"""

import errno
import fcntl
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from hcsmoe_hub.checkpoint.durable import naming

# Locked by the system, and the file with the name of the owner.
LOCK = "lock"
OWNER = "owner.json"
# File systems that several machines may share; on every other one, a lock of the system is respected by all.
_SHARED = ("nfs", "cifs", "smb", "fuse", "lustre", "ceph", "gpfs", "beegfs", "afs", "9p", "virtiofs", "gfs2", "ocfs2")

# What file systems without locks answer.
_WITHOUT_LOCKS = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL})


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """A process that writes to a folder, or has written to it until it was killed.

    Attributes:
        host: Name of its machine.
        space: Which of the numberings of processes of that machine ``pid`` belongs to; containers have their own.
        pid: Its number.
        began: When it was started, in units of the system since the machine was; 0 where that is not known.
        since: When it began to write, in words.
    """

    host: str
    space: int
    pid: int
    began: int
    since: str

    @classmethod
    def of_this_process(cls) -> "Owner":
        """The process that calls this."""
        since = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        return cls(host=os.uname().nodename, space=_space(), pid=os.getpid(), began=_began(os.getpid()), since=since)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"

    @property
    def is_visible(self) -> bool:
        """Whether this process could see it if it ran."""
        return (self.host, self.space) == (os.uname().nodename, _space())

    @property
    def runs(self) -> bool:
        """Whether it runs, if it is visible."""
        return psutil.pid_exists(self.pid) and _began(self.pid) == self.began


class OwnedError(Exception):
    """Another process writes to the folder, or may do so.

    Attributes:
        owner: It, if its name is known.
        is_certain: Whether it runs; otherwise it may have been killed on a machine that cannot be seen from here.
    """

    def __init__(self, owner: Owner | None, *, is_certain: bool) -> None:
        super().__init__(owner, is_certain)
        self.owner = owner
        self.is_certain = is_certain


@contextmanager
def owning(folder: Path) -> Iterator[None]:
    """Makes this process the owner of a folder inside a ``with`` block.

    Args:
        folder: An existing folder.

    Raises:
        OwnedError: If another process is its owner, or nobody can know that it no longer is.
    """
    with _locked(folder):
        _take(folder)
        try:
            yield
        finally:
            # What went wrong before matters more; the next run recognises an owner that has ended.
            with suppress(OSError):
                (folder / OWNER).unlink(missing_ok=True)
                (folder / LOCK).unlink(missing_ok=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds a lock of the system inside a ``with`` block, where its file system has any.

    Raises:
        OwnedError: If another process holds it.
    """
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise OwnedError(read_owner(folder), is_certain=True) from None
    except NotImplementedError:
        # Where nothing can be locked, the owner's name alone guards the folder.
        pass
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise
    try:
        yield
    finally:
        lock.release()


def read_owner(folder: Path) -> Owner | None:
    """The owner that a folder names; ``None`` if there is none, or its name was not written to the end."""
    return _read(folder / OWNER)


def _read(path: Path) -> Owner | None:
    with suppress(OSError, ValueError, TypeError):
        content: Any = json.loads(path.read_text("utf-8"))
        return Owner(**content)
    return None


def _take(folder: Path) -> None:
    """Writes the name of this process where there is none, or that of one which no longer runs."""
    path, content = folder / OWNER, json.dumps(asdict(Owner.of_this_process())).encode()
    if path.exists():
        owner = read_owner(folder)
        if not _is_respected(folder, owner):
            _check_gone(owner)
        _set_aside(folder, owner)
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        raise OwnedError(read_owner(folder), is_certain=True) from None
    try:
        with naming(path), os.fdopen(file, "wb") as opened:
            opened.write(content)
    except BaseException:
        # Half of a name would be that of a process that nobody can find.
        path.unlink(missing_ok=True)
        raise


def _set_aside(folder: Path, owner: Owner | None) -> None:
    """Removes the name of an owner that no longer runs.

    Raises:
        OwnedError: If another process was quicker.
    """
    aside = folder / f"{OWNER}-{uuid.uuid4().hex}"
    with suppress(FileNotFoundError):
        os.replace(folder / OWNER, aside)
        found = _read(aside)
        if found != owner:
            os.replace(aside, folder / OWNER)
            raise OwnedError(found, is_certain=True)
        aside.unlink()


def _check_gone(owner: Owner | None) -> None:
    """Checks that an owner does not run any more.

    Raises:
        OwnedError: If it does, or nobody can know.
    """
    if owner is None or not owner.is_visible:
        raise OwnedError(owner, is_certain=False)
    if owner.runs:
        raise OwnedError(owner, is_certain=True)


def _is_respected(folder: Path, owner: Owner | None) -> bool:
    """Whether the lock of the system, which this process has, shows that an earlier owner has ended."""
    is_near = _is_local(folder) or (owner is not None and owner.host == os.uname().nodename)
    return is_near and _is_exclusive(folder / LOCK)


def _is_exclusive(lock: Path) -> bool:
    """Whether a lock that this process holds is refused to everybody else."""
    file = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except OSError:
        return False
    finally:
        os.close(file)
    return False


def _is_local(folder: Path) -> bool:
    """Whether no other machine can write to the file system of a folder; ``False`` where that is not known."""
    device = folder.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text("utf-8", "replace").splitlines():
            fields, _, rest = line.partition(" - ")
            if fields.split()[2] == wanted:
                return not rest.startswith(_SHARED)
    return False


def _space() -> int:
    try:
        return Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return 0


def _began(pid: int) -> int:
    try:
        # The name of the program before the last bracket may contain anything.
        return int(Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()[19])
    except OSError:
        return 0
