"""Routes of the loopback Hub for large files: which ones it has, and where to send the others.

As on the Hub, upload addresses contain their own permission, so these routes do not need a token.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from hub.connection import Connection, Route
from hub.repository import Refusal, Repository

JSON = {"Content-Type": "application/vnd.git-lfs+json"}


def post_batch(call: Connection, *, kind: str, repo_id: str) -> None:
    """Where to send each object; nowhere if it exists or exceeds the quota."""
    asked = call.read_json()
    # Anyone who can read can open a pull request and upload its files; such a request has no revision.
    find = call.writable if "ref" in asked else call.repository
    repository = find(kind.rstrip("/") or "models", repo_id)
    call.account()
    objects = []
    for wanted in asked["objects"]:
        known = {"oid": wanted["oid"], "size": wanted["size"], "authenticated": True}
        if wanted["oid"] in repository.objects:
            objects.append(known)
        elif _used(repository) + wanted["size"] > call.hub.quotas.get(repo_id, 1 << 60):
            objects.append({**known, "error": {"code": 507, "message": "Storage limit reached"}})
        else:
            objects.append({**known, "actions": _actions(call, repository, wanted["oid"], wanted["size"])})
    call.send_json({"transfer": "basic", "objects": objects}, **JSON)


def _used(repository: Repository) -> int:
    return sum(path.stat().st_size for path in repository.objects.values())


def _actions(call: Connection, repository: Repository, oid: str, size: int) -> dict[str, object]:
    """Addresses for one object: for all of it, or for each of its parts."""
    start = f"{call.hub.url}/_lfs/{repository.kind}/{repository.id}/{oid}"
    verify = {"href": f"{start}/verify"}
    step = call.hub.part_bytes
    if size <= step:
        return {"upload": {"href": f"{start}/whole?signature=s"}, "verify": verify}
    parts = {f"{1 + number:05}": f"{start}/parts/{1 + number}?signature=s" for number in range(-(-size // step))}
    return {"upload": {"href": f"{start}/complete", "header": {"chunk_size": str(step), **parts}}, "verify": verify}


def put_whole(call: Connection, *, kind: str, repo_id: str, oid: str) -> None:
    """Takes an object in one piece."""
    piece = call.hub.receive(call.read_blocks())
    _store(call, call.hub.repositories[kind, repo_id], oid, [piece])
    call.send_json({})


def put_part(call: Connection, *, kind: str, repo_id: str, oid: str, number: str) -> None:
    """Takes a part of an object."""
    piece = call.hub.receive(call.read_blocks())
    with call.hub.lock:
        call.hub.parts[repo_id, oid, int(number)] = piece
    call.send_json({}, ETag=f'"{hashlib.md5(piece.read_bytes()).hexdigest()}"')


def post_complete(call: Connection, *, kind: str, repo_id: str, oid: str) -> None:
    """Assembles an object; idempotent."""
    repository, asked = call.hub.repositories[kind, repo_id], call.read_json()
    if oid not in repository.objects:
        pieces = []
        for part in asked["parts"]:
            piece = call.hub.parts.get((repo_id, oid, part["partNumber"]))
            if piece is None or part["etag"].strip('"') != hashlib.md5(piece.read_bytes()).hexdigest():
                raise Refusal(400, f"Part {part['partNumber']} is not what was uploaded")
            pieces.append(piece)
        _store(call, repository, oid, pieces)
    call.send_json({}, **JSON)


def _store(call: Connection, repository: Repository, oid: str, pieces: Sequence[Path]) -> None:
    """Keeps an object if it is what its name says."""
    path = call.hub.receive(piece.read_bytes() for piece in pieces)
    if hashlib.sha256(path.read_bytes()).hexdigest() != oid:
        raise Refusal(400, "The content is not what its SHA-256 says")
    with call.hub.lock:
        repository.objects[oid] = path


def post_verify(call: Connection, *, kind: str, repo_id: str, oid: str) -> None:
    """Checks that an object has arrived."""
    asked, objects = call.read_json(), call.hub.repositories[kind, repo_id].objects
    if oid not in objects or objects[oid].stat().st_size != asked["size"]:
        raise Refusal(404, "The object has not arrived")
    call.send_json({}, **JSON)


_OBJECT = r"/_lfs/(?P<kind>models|datasets)/(?P<repo_id>[^/]+/[^/]+)/(?P<oid>[0-9a-f]{64})"
ROUTES: tuple[Route, ...] = (
    (r"/(?P<kind>datasets/)?(?P<repo_id>[^/]+/[^/]+)\.git/info/lfs/objects/batch", ("POST",), post_batch),
    (rf"{_OBJECT}/whole", ("PUT",), put_whole),
    (rf"{_OBJECT}/parts/(?P<number>\d+)", ("PUT",), put_part),
    (rf"{_OBJECT}/complete", ("POST",), post_complete),
    (rf"{_OBJECT}/verify", ("POST",), post_verify),
)
