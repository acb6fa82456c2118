"""What a push is asked to do, and what it did."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class PushOptions:
    """Where a result goes.

    Attributes:
        repo_id: ``namespace/name``.
        private: Make the repository a private one; one that is there must be private already.
        create_pr: Propose the result as a pull request.
        overwrite: Replace a checkpoint that is already there.
        revision: Branch, made if it is not there; ``None`` is ``main``.
    """

    repo_id: str
    private: bool = False
    create_pr: bool = False
    overwrite: bool = False
    revision: str | None = None

    @property
    def branch(self) -> str:
        """The branch that the result goes to, or is proposed for."""
        return self.revision or "main"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pushed:
    """What a push did.

    Attributes:
        repo_id: ``namespace/name``.
        private: Whether the repository is a private one.
        revision: Branch that holds the result; of a pull request, its ref.
        commit: Hash of the commit that holds it.
        url: Address of that commit.
        pull_request: Address of the pull request, if there is one.
        changed: Whether there is a new commit; otherwise everything was there.
        files: Names of the files of the result.
        bytes: Size of all of them.
        bytes_sent: Bytes of content that were sent; ``None`` where the Xet client has sent them and does not tell.
        deleted: Files of an older checkpoint that the commit deleted.
        left_out: Files of the folder that belong to no checkpoint, and stayed.
    """

    repo_id: str
    private: bool
    revision: str
    commit: str
    url: str
    pull_request: str | None
    changed: bool
    files: list[str]
    bytes: int
    bytes_sent: int | None
    deleted: list[str]
    left_out: list[str]

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON values."""
        return asdict(self)
