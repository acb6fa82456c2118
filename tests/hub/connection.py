"""One connection to the loopback Hub: reads requests, logs them, sends responses, and breaks off on request."""

import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import unquote, urlsplit

from hub.faults import Fault
from hub.repository import Account, Refusal, Repository

if TYPE_CHECKING:
    from hub.server import Hub

BLOCK_BYTES = 1 << 20
# Pieces of a slow body, each after a pause.
SLOW_PIECES, SLOW_SECONDS = 8, 0.02
REFUSED: Mapping[Fault, int] = {
    Fault.TOO_MANY_REQUESTS: 429,
    Fault.SERVER_ERROR: 500,
    Fault.BAD_GATEWAY: 502,
    Fault.UNAVAILABLE: 503,
}


# Faults that let only half of a request arrive.
HALVED = (Fault.CUT_REQUEST, Fault.HELD)


class Dropped(Exception):
    """The connection has ended, or has to."""


@dataclass(slots=True)
class Request:
    """One logged request.

    Attributes:
        method: ``GET`` and the like.
        path: Without query, unquoted.
        range: The header of that name.
        query: The part after the question mark.
        status: Of the response; 0 until there is one.
        received: Bytes of the request's body; grows as they arrive.
        sent: Bytes of the answer's body; grows as they are sent.
        length: Bytes that the request's body should have.
        fault: The injected fault.
    """

    method: str
    path: str
    range: str | None
    query: str = ""
    status: int = 0
    received: int = 0
    sent: int = 0
    length: int = 0
    fault: Fault | None = None


# A route: the pattern of its path, its methods, and what answers; groups of the pattern are arguments.
Route = tuple[str, tuple[str, ...], Callable[..., None]]


class Connection(BaseHTTPRequestHandler):
    """One client's connection; the routes call it to read and to answer."""

    protocol_version = "HTTP/1.1"
    server: "HubServer"
    logged: Request

    @property
    def hub(self) -> "Hub":
        return self.server.hub

    def log_message(self, format: str, *arguments: Any) -> None:
        """Keeps the terminal quiet: ``Hub.requests`` is the log."""

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.logged = Request(self.command, unquote(url.path), self.headers.get("Range"), url.query)
        self.logged.length = int(self.headers.get("Content-Length", 0))
        self.logged.fault = self.hub.faults(self.command, self.logged.path)
        self.hub.requests.append(self.logged)
        try:
            self._answer(url.path)
        except (Dropped, ConnectionError):
            self.close_connection = True

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _answer(self, path: str) -> None:
        try:
            self._fail_if_planned()
            if self._lead_on():
                return
            for pattern, methods, route in self.server.routes:
                match = re.fullmatch(pattern, path)
                if match and self.command in methods:
                    groups = {name: unquote(text) for name, text in match.groupdict(default="").items()}
                    return route(self, **groups)
            raise Refusal(404, f"There is no {self.command} {path} here.")
        except Refusal as refusal:
            self.read_body()
            self.send_json({"error": str(refusal)}, status=refusal.status, **refusal.headers)

    def _fail_if_planned(self) -> None:
        for prefix, status in self.hub.failures.items():
            if self.logged.path.startswith(prefix):
                raise Refusal(status, "The server is set to fail here.")
        if self.logged.path in self.hub.pages:
            self.read_body()
            self.send_whole(b"<html>Please log in</html>", headers={"Content-Type": "text/html; charset=utf-8"})
            raise Dropped
        fault = self.logged.fault
        if fault is Fault.BAD_GATEWAY:
            self.read_body()
            self.send_whole(b"<html>Bad gateway</html>", status=502, headers={"Content-Type": "text/html"})
            raise Dropped
        if fault in REFUSED:
            pause = {"Retry-After": "0"} if fault is Fault.TOO_MANY_REQUESTS else {}
            raise Refusal(REFUSED[fault], "The server is set to fail once.", headers=pause)

    def _lead_on(self) -> bool:
        """Redirects a former name of a repository to the current one."""
        for former, name in self.hub.renamed.items():
            for start in ("/", "/api/models/"):
                if f"{self.logged.path}/".startswith(f"{start}{former}/"):
                    self.read_body()
                    location = self.path.replace(former, name, 1)
                    self.send_whole(b"", status=307, headers={"Location": location})
                    return True
        return False

    # Who asks

    @property
    def token(self) -> str | None:
        """The access token of the request."""
        authorization = self.headers.get("Authorization")
        return None if authorization is None else authorization.removeprefix("Bearer ")

    def account(self) -> Account:
        """Who asks.

        Raises:
            Refusal: If the token is unknown.
        """
        found = self.hub.account(self.token)
        if found is None:
            raise Refusal(401, "Invalid username or password.")
        return found

    def repository(self, kind: str, repo_id: str, *, for_files: bool = False) -> Repository:
        """The repository, as far as the request's token opens it."""
        return self.hub.find(kind, repo_id, self.token, for_files=for_files)

    def writable(self, kind: str, repo_id: str) -> Repository:
        """The repository, if the request's token may write to it.

        Raises:
            Refusal: If it may not.
        """
        repository = self.repository(kind, repo_id)
        if not self.account().may_write(repo_id):
            raise Refusal(403, f"You don't have write access to {repo_id}")
        return repository

    # What arrives

    def read_blocks(self) -> Iterator[bytes]:
        """The rest of the request's body, as it arrives."""
        logged, block_bytes = self.logged, BLOCK_BYTES
        end = logged.length // 2 if logged.fault in HALVED else logged.length
        if logged.fault is Fault.SLOW:
            block_bytes = max(1, logged.length // self.hub.slow_pieces)
        while logged.received < end:
            block = self.rfile.read1(min(block_bytes, end - logged.received))
            if not block:
                raise Dropped
            logged.received += len(block)
            if logged.fault is Fault.SLOW:
                time.sleep(self.hub.slow_seconds)
            yield block
        if logged.fault in HALVED:
            self._drop()

    def _drop(self) -> NoReturn:
        """Ends the connection, after the test releases it if it is held."""
        if self.logged.fault is Fault.HELD:
            self.hub.held.set()
            self.hub.released.wait()
        raise Dropped

    def read_body(self) -> bytes:
        """The rest of the request's body."""
        return b"".join(self.read_blocks())

    def read_json(self) -> Any:
        return json.loads(self.read_body())

    # What is answered

    def send_head(self, status: int, headers: Mapping[str, str]) -> None:
        if self.logged.fault in (Fault.LOST_ANSWER, *HALVED):
            self._drop()
        self.logged.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def send_content(self, block: bytes) -> None:
        """Sends a part of the answer's body."""
        fault = self.logged.fault
        if fault is Fault.CUT_ANSWER:
            block = block[: len(block) // 2]
        step = max(1, len(block) // self.hub.slow_pieces) if fault is Fault.SLOW else len(block) or 1
        for start in range(0, len(block), step):
            # Counted first: a client that has received the bytes must find them in the log.
            self.logged.sent += len(block[start : start + step])
            self.wfile.write(block[start : start + step])
            if fault is Fault.SLOW:
                time.sleep(self.hub.slow_seconds)
        if fault is Fault.CUT_ANSWER:
            raise Dropped

    def send_whole(self, content: bytes, *, status: int = 200, headers: Mapping[str, str]) -> None:
        self.send_head(status, {"Content-Length": str(len(content)), **headers})
        if self.command != "HEAD":
            self.send_content(content)

    def send_json(self, answer: object, *, status: int = 200, **headers: str) -> None:
        content = json.dumps(answer).encode()
        self.send_whole(content, status=status, headers={"Content-Type": "application/json", **headers})


class HubServer(ThreadingHTTPServer):
    """Listens on a free port."""

    daemon_threads = True
    # Many clients connect at once, and should not have to retry.
    request_queue_size = 128

    def __init__(self, hub: "Hub", routes: tuple[Route, ...]) -> None:
        self.hub = hub
        self.routes = routes
        super().__init__(("127.0.0.1", 0), Connection)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignores clients that have disconnected; any other error is a bug of this server."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)
