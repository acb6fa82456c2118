"""The loopback Hub itself: what it holds, who may see it, and where it listens."""

import itertools
import threading
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

from hub import lfs, reading, writing, xet
from hub.connection import SLOW_PIECES, SLOW_SECONDS, HubServer, Request
from hub.faults import Plan, no_faults
from hub.repository import Account, Refusal, Repository


class Hub:
    """The server: a context manager that listens on a free port.

    Args:
        tokens: Valid access tokens, each with its account, or with the private and gated repositories that it opens.

    Attributes:
        repositories: Every repository by kind and id.
        requests: Every request so far.
        failures: Prefix of a path to the status of every response to it.
        pages: Paths that a proxy answers with a page of its own.
        renamed: Former id of a model to its current one.
        faults: Chooses the fault of each request.
        slow_pieces: Number of pieces that a slow body comes in.
        slow_seconds: Pause after each of them.
        part_bytes: Larger objects are taken in parts of this size.
        quotas: Storage limit of large files, by repository id.
        parts: Parts of large files that have arrived.
        lock: Held during every change.
        held: Set when a request is held.
        released: To be set to end the connections that are held.
    """

    def __init__(self, *, tokens: Mapping[str, Account | Collection[str]] | None = None) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.requests: list[Request] = []
        self.failures: dict[str, int] = {}
        self.pages: set[str] = set()
        self.renamed: dict[str, str] = {}
        self.faults: Plan = no_faults
        self.slow_pieces, self.slow_seconds = SLOW_PIECES, SLOW_SECONDS
        self.part_bytes = 1 << 40
        self.quotas: dict[str, int] = {}
        self.parts: dict[tuple[str, str, int], Path] = {}
        self.lock = threading.RLock()
        self.held, self.released = threading.Event(), threading.Event()
        self._accounts = {
            token: account if isinstance(account, Account) else Account(name="reader", opens=account)
            for token, account in (tokens or {}).items()
        }
        self._folder = TemporaryDirectory(prefix="hub-")
        self._numbers = itertools.count()
        self._server = HubServer(self, (*reading.ROUTES, *writing.ROUTES, *lfs.ROUTES, *xet.ROUTES))

    @property
    def url(self) -> str:
        """What a client's ``HF_ENDPOINT`` has to be."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def add(self, repo_id: str, folder: Path, *, kind: str = "models") -> Repository:
        """Serves ``folder`` as the branch ``main`` of a new public repository."""
        repository = Repository(id=repo_id, kind=kind)
        repository.commit(folder, ref="main")
        self.repositories[kind, repo_id] = repository
        return repository

    def model(self, repo_id: str) -> Repository:
        """A model repository."""
        return self.repositories["models", repo_id]

    def account(self, token: str | None) -> Account | None:
        """Who a token belongs to; ``None`` without a token.

        Raises:
            Refusal: If it belongs to nobody.
        """
        if token is not None and token not in self._accounts:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return None if token is None else self._accounts[token]

    def find(self, kind: str, repo_id: str, token: str | None, *, for_files: bool) -> Repository:
        """The repository, if ``token`` may see it, and its files where they are asked for.

        Raises:
            Refusal: If it may not, or there is no such repository; the Hub does not reveal which.
        """
        account = self.account(token)
        is_opened = account is not None and account.may_read(repo_id)
        repository = self.repositories.get((kind, repo_id))
        if repository is None or (repository.private and not is_opened):
            raise Refusal(401 if token is None else 404, "Repository not found", code="RepoNotFound")
        if repository.disabled:
            raise Refusal(403, "Access to this resource is disabled.")
        if for_files and repository.gated and not is_opened:
            raise Refusal(401 if token is None else 403, f"Access to {repo_id} is restricted.", code="GatedRepo")
        return repository

    def receive(self, blocks: Iterable[bytes]) -> Path:
        """Stores content as it arrives; invisible until complete."""
        path = Path(self._folder.name) / str(next(self._numbers))
        with path.open("wb") as file:
            for block in blocks:
                file.write(block)
        return path

    def keep(self, content: bytes) -> Path:
        """Keeps some content."""
        return self.receive([content])

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
        self._folder.cleanup()
