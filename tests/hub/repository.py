"""What the loopback Hub holds: accounts, and repositories as sets of commits."""

import hashlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

# The first commit of every repository that is made over the API.
GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


class Refusal(Exception):
    """An answer that is an error, worded as the Hub words it."""

    def __init__(self, status: int, message: str, *, code: str = "", headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """Who a token belongs to, and what it may do.

    Attributes:
        name: Name of the user, and of the namespace of the user.
        role: A ``fineGrained`` token may write to the repositories that it opens, a ``read`` token to none of them.
        orgs: Organizations of the user.
        opens: Private and gated repositories of others that may be read.
    """

    name: str
    role: Literal["read", "write", "fineGrained"] = "read"
    orgs: tuple[str, ...] = ()
    opens: Collection[str] = ()

    def may_read(self, repo_id: str) -> bool:
        return repo_id in self.opens or repo_id.split("/")[0] in (self.name, *self.orgs)

    def may_write(self, repo_id: str) -> bool:
        if self.role == "fineGrained":
            return repo_id in self.opens
        return self.role == "write" and repo_id.split("/")[0] in (self.name, *self.orgs)


@dataclass(frozen=True, slots=True)
class StoredFile:
    """Content of one file of a commit.

    Attributes:
        path: Path of the content.
        size: In bytes.
        oid: Git blob id: of the content, or of the pointer to it.
        sha256: Hash of the content if it is held as a large file, otherwise empty.
    """

    path: Path
    size: int
    oid: str
    sha256: str = ""

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid


def plain_file(path: Path) -> StoredFile:
    """A file that is stored in git itself."""
    content = path.read_bytes()
    return StoredFile(path, len(content), blob_id(content))


def large_file(path: Path, sha256: str) -> StoredFile:
    """A file of which git holds a pointer."""
    size = path.stat().st_size
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
    return StoredFile(path, size, blob_id(pointer.encode()), sha256)


def _stored_file(path: Path) -> StoredFile:
    """A file as the Hub holds it: shards are large files."""
    if path.suffix != ".safetensors":
        return plain_file(path)
    with path.open("rb") as content:
        return large_file(path, hashlib.file_digest(content, "sha256").hexdigest())


def blob_id(content: bytes) -> str:
    """Name that git gives to some content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True, slots=True)
class Commit:
    """One state of a repository."""

    sha: str
    files: Mapping[str, StoredFile]
    parent: str | None = None
    title: str = ""


@dataclass(slots=True, kw_only=True)
class Repository:
    """One repository.

    Attributes:
        id: ``org/name``.
        kind: ``models`` or ``datasets``, as in the paths of the API.
        private: Hidden from everyone whose token does not open it.
        gated: Listed for everyone, but its files need a token that opens it.
        disabled: Taken down by the Hub.
        commits: Every commit by its hash.
        refs: Branch or tag to the hash of its commit.
        tags: Those of the refs that are tags.
        objects: Large files by their SHA-256, whether a commit names them or not.
    """

    id: str
    kind: str = "models"
    private: bool = False
    gated: bool = False
    disabled: bool = False
    xet: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    tags: set[str] = field(default_factory=set)
    objects: dict[str, Path] = field(default_factory=dict)

    def commit(self, folder: Path, *, ref: str) -> str:
        """Makes the content of ``folder`` a commit, points ``ref`` to it, and returns its hash."""
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        files = {path.relative_to(folder).as_posix(): _stored_file(path) for path in paths}
        return self.record(files, ref=ref, parent=None)

    def record(self, files: Mapping[str, StoredFile], *, ref: str, parent: str | None, title: str = "") -> str:
        """Makes some files a commit, points ``ref`` to it, and returns its hash."""
        listing = "".join(f"{name} {file.oid}\n" for name, file in sorted(files.items()))
        sha = hashlib.sha1(f"{self.kind} {self.id} {parent} {title}\n{listing}".encode()).hexdigest()
        self.commits[sha] = Commit(sha, dict(files), parent, title)
        self.refs[ref] = sha
        return sha

    def at(self, revision: str) -> Commit:
        """The commit of a branch, a tag or a hash.

        Raises:
            Refusal: If there is none.
        """
        sha = self.refs.get(revision, revision)
        if sha not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", code="RevisionNotFound")
        return self.commits[sha]

    def history(self, revision: str) -> Iterator[Commit]:
        """A commit and all before it."""
        commit: Commit | None = self.at(revision)
        while commit is not None:
            yield commit
            commit = self.commits[commit.parent] if commit.parent is not None else None

    def contents(self, revision: str = "main") -> dict[str, bytes]:
        """Every file of a commit."""
        return {name: file.path.read_bytes() for name, file in self.at(revision).files.items()}
