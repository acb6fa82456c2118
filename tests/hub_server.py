"""A small Hugging Face Hub on 127.0.0.1: enough of its HTTP API for the real client to read repositories.

    with Hub(tokens={"hf_reader": {"org/secret"}}) as hub:
        hub.add("org/name", folder)
        hub.add("org/secret", folder).private = True
        ...  # run a client whose HF_ENDPOINT is hub.url
        hub.requests  # every request, with the bytes that answered it

A repository is a set of commits, a commit a set of files in a folder; a branch or tag is a name for a commit.
"""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class StoredFile:
    """Content of one file of a commit; its git blob id is also its ETag."""

    path: Path
    size: int
    oid: str


@dataclass(frozen=True, slots=True)
class Commit:
    """One state of a repository."""

    sha: str
    files: Mapping[str, StoredFile]


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
    """

    id: str
    kind: str = "models"
    private: bool = False
    gated: bool = False
    disabled: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, folder: Path, *, ref: str) -> str:
        """Makes the content of ``folder`` a commit, points ``ref`` to it, and returns its hash."""
        files = {}
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            content = path.read_bytes()
            oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            files[path.relative_to(folder).as_posix()] = StoredFile(path, len(content), oid)
        listing = "".join(f"{name} {file.oid}\n" for name, file in files.items())
        sha = hashlib.sha1(f"{self.kind} {self.id}\n{listing}".encode()).hexdigest()
        self.commits[sha] = Commit(sha, files)
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


@dataclass(slots=True)
class Request:
    """One logged request; ``sent`` counts the bytes of content, without headers, and grows as they are sent."""

    method: str
    path: str
    range: str | None
    status: int = 0
    sent: int = 0


class Refusal(Exception):
    """An answer that is an error, worded as the Hub words it."""

    def __init__(self, status: int, message: str, *, code: str = "", headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}


class Hub:
    """The server: a context manager that listens on a free port.

    Args:
        tokens: Valid access tokens, each with the private and gated repositories that it opens.

    Attributes:
        repositories: Every repository by kind and id.
        requests: Every request so far.
        failures: Beginning of a path to the status that answers every request for it.
    """

    def __init__(self, *, tokens: Mapping[str, Collection[str]] | None = None) -> None:
        self.requests: list[Request] = []
        self.failures: dict[str, int] = {}
        self._tokens = tokens or {}
        self.repositories: dict[tuple[str, str], Repository] = {}
        self._server = _Server(self)

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

    def find(self, kind: str, repo_id: str, token: str | None, *, for_files: bool) -> Repository:
        """The repository, if ``token`` may see it, and its files where they are asked for.

        Raises:
            Refusal: If it may not, or there is no such repository: the Hub does not tell which.
        """
        if token is not None and token not in self._tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        is_opened = token is not None and repo_id in self._tokens[token]
        repository = self.repositories.get((kind, repo_id))
        if repository is None or (repository.private and not is_opened):
            raise Refusal(401 if token is None else 404, "Repository not found", code="RepoNotFound")
        if repository.disabled:
            raise Refusal(403, "Access to this resource is disabled.")
        if for_files and repository.gated and not is_opened:
            raise Refusal(401 if token is None else 403, f"Access to {repo_id} is restricted.", code="GatedRepo")
        return repository

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        super().__init__(("127.0.0.1", 0), _Handler)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    logged: Request
    body: bytes

    def log_message(self, format: str, *arguments: Any) -> None:
        """Keeps the terminal quiet: ``Hub.requests`` is the log."""

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.logged = Request(self.command, unquote(url.path), self.headers.get("Range"))
        self.server.hub.requests.append(self.logged)
        try:
            for prefix, status in self.server.hub.failures.items():
                if self.logged.path.startswith(prefix):
                    raise Refusal(status, "The server was told to fail here.")
            for pattern, methods, route in ROUTES:
                match = re.fullmatch(pattern, url.path)
                if match and self.command in methods:
                    groups = {name: unquote(text) for name, text in match.groupdict(default="").items()}
                    route(self, **groups)
                    return
            raise Refusal(404, f"There is no {self.command} {url.path} here.")
        except Refusal as refusal:
            self.send_json({"error": str(refusal)}, status=refusal.status, **refusal.headers)

    do_HEAD = do_POST = do_GET

    def repository(self, kind: str, repo_id: str, *, for_files: bool = False) -> Repository:
        """The repository, as far as the request's token opens it."""
        authorization = self.headers.get("Authorization")
        token = None if authorization is None else authorization.removeprefix("Bearer ")
        return self.server.hub.find(kind, repo_id, token, for_files=for_files)

    def send_head(self, status: int, headers: Mapping[str, str]) -> None:
        self.logged.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def send_content(self, block: bytes) -> None:
        # Counted first: whoever has received the bytes must find them in the log.
        self.logged.sent += len(block)
        self.wfile.write(block)

    def send_json(self, answer: object, *, status: int = 200, **headers: str) -> None:
        content = json.dumps(answer).encode()
        self.send_head(status, {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers})
        if self.command != "HEAD":
            self.send_content(content)

    def get_info(self, *, kind: str, repo_id: str, revision: str) -> None:
        """What the Hub knows about a repository at one commit."""
        repository = self.repository(kind, repo_id)
        commit = repository.at(revision or "main")
        flags = {"private": repository.private, "gated": "auto" if repository.gated else False, "disabled": False}
        siblings = [{"rfilename": name} for name in commit.files]
        self.send_json({"id": repository.id, "sha": commit.sha, **flags, "siblings": siblings})

    def get_tree(self, *, kind: str, repo_id: str, revision: str, folder: str) -> None:
        """The files in a folder and in all its sub-folders; the folders are no entries of their own."""
        files = self.repository(kind, repo_id).at(revision).files
        prefix = f"{folder}/" if folder else ""
        entries = [_entry(name, file) for name, file in files.items() if name.startswith(prefix)]
        if folder and not entries:
            raise Refusal(404, f"{folder} does not exist on {revision}", code="EntryNotFound")
        self.send_json(entries)

    def post_paths_info(self, *, kind: str, repo_id: str, revision: str) -> None:
        """The entries of the files that the body names; the others are left out."""
        commit = self.repository(kind, repo_id).at(revision)
        names = parse_qs(self.body.decode()).get("paths", [])
        self.send_json([_entry(name, commit.files[name]) for name in names if name in commit.files])

    def get_file(self, *, kind: str, repo_id: str, revision: str, name: str) -> None:
        """A file, or the part of it that ``Range`` names."""
        commit = self.repository(kind.rstrip("/") or "models", repo_id, for_files=True).at(revision)
        headers = {"X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
        if name not in commit.files:
            raise Refusal(404, "Entry not found", code="EntryNotFound", headers=headers)
        file = commit.files[name]
        part = _part(self.logged.range, file.size)
        headers |= {"ETag": f'"{file.oid}"', "Content-Length": str(len(part))}
        if self.logged.range is None:
            self.send_head(200, headers)
        else:
            self.send_head(206, {**headers, "Content-Range": f"bytes {part.start}-{part.stop - 1}/{file.size}"})
        if self.command == "HEAD":
            return
        with file.path.open("rb") as content:
            content.seek(part.start)
            for start in range(part.start, part.stop, BLOCK_BYTES):
                self.send_content(content.read(min(BLOCK_BYTES, part.stop - start)))


def _entry(name: str, file: StoredFile) -> dict[str, str | int]:
    return {"type": "file", "path": name, "size": file.size, "oid": file.oid}


def _part(header: str | None, size: int) -> range:
    """Positions that a ``Range`` header names, as in ``bytes=2-5`` or ``bytes=2-``."""
    if header is None:
        return range(size)
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", header)
    part = range(int(match[1]), min(int(match[2] or size) + 1, size)) if match else range(0)
    if not part:
        raise Refusal(416, f"{header} is no part of the file.", headers={"Content-Range": f"bytes */{size}"})
    return part


_API = r"/api/(?P<kind>models|datasets)/(?P<repo_id>[^/]+/[^/]+)"
ROUTES: tuple[tuple[str, tuple[str, ...], Callable[..., None]], ...] = (
    (rf"{_API}(?:/revision/(?P<revision>[^/]+))?", ("GET",), _Handler.get_info),
    (rf"{_API}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", ("GET",), _Handler.get_tree),
    (rf"{_API}/paths-info/(?P<revision>[^/]+)", ("POST",), _Handler.post_paths_info),
    (
        r"/(?P<kind>datasets/)?(?P<repo_id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)",
        ("GET", "HEAD"),
        _Handler.get_file,
    ),
)
