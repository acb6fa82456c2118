"""Routes of the loopback Hub that serve large files over Xet, for repositories whose ``xet`` is set.

A real storage server finds the chunks of a file in the xorbs of many; here each file is one xorb, in chunks of a fixed
size and without compression. Only downloads are served. The client does not compare hashes of what it downloads, so a
file's SHA-256 is its Xet hash, and the hash of its only xorb, too.
"""

import re
import struct
from pathlib import Path

from hub.connection import Connection, Route
from hub.repository import Refusal, StoredFile

CHUNK_BYTES = 65_536
HEADER_BYTES = 8
# Far in the future: clients renew a token that is about to expire.
EXPIRATION = 4_000_000_000


def headers_of(call: Connection, repo_id: str, commit: str, file: StoredFile) -> dict[str, str]:
    """What the answer about a file says about Xet."""
    route = f"{call.hub.url}/api/models/{repo_id}/xet-read-token/{commit}"
    return {"X-Xet-Hash": file.sha256, "X-Xet-Refresh-Route": route}


def get_token(call: Connection, *, repo_id: str, revision: str) -> None:
    """Where the storage server is, and what opens it."""
    call.repository("models", repo_id, for_files=True).at(revision)
    expiration = {"X-Xet-Token-Expiration": str(EXPIRATION), "X-Xet-Access-Token": "xet_token"}
    call.send_json({}, **{"X-Xet-Cas-Url": f"{call.hub.url}/_xet"}, **expiration)


def get_reconstruction(call: Connection, *, oid: str) -> None:
    """Which chunks of which xorbs a file, or a range of it, consists of."""
    size = _content(call, oid).stat().st_size
    asked = re.fullmatch(r"bytes=(\d+)-(\d+)", call.logged.range or f"bytes=0-{size - 1}")
    if asked is None or int(asked[1]) >= size:
        raise Refusal(416, "The file has no such part.")
    start, end = int(asked[1]), min(int(asked[2]) + 1, size)
    first, last = start // CHUNK_BYTES, -(-end // CHUNK_BYTES)
    chunks = {"start": first, "end": last}
    stored_end = min(last * CHUNK_BYTES, size) + last * HEADER_BYTES
    part = {"start": first * (CHUNK_BYTES + HEADER_BYTES), "end": stored_end - 1}
    unpacked = min(last * CHUNK_BYTES, size) - first * CHUNK_BYTES
    call.send_json(
        {
            "offset_into_first_range": start - first * CHUNK_BYTES,
            "terms": [{"hash": oid, "unpacked_length": unpacked, "range": chunks}],
            "fetch_info": {
                oid: [{"range": chunks, "url": f"{call.hub.url}/_xorbs/{oid}?signature=s", "url_range": part}]
            },
        }
    )


def get_xorb(call: Connection, *, oid: str) -> None:
    """Some chunks, each with its header."""
    content = _content(call, oid).read_bytes()
    parts = [content[start : start + CHUNK_BYTES] for start in range(0, len(content), CHUNK_BYTES)]
    stored = b"".join(_header(len(part)) + part for part in parts)
    asked = re.fullmatch(r"bytes=(\d+)-(\d+)", call.logged.range or "")
    if asked is None:
        raise Refusal(400, "A range is needed.")
    start, end = int(asked[1]), int(asked[2]) + 1
    headers = {"Content-Length": str(end - start), "Content-Range": f"bytes {start}-{end - 1}/{len(stored)}"}
    call.send_head(206, headers)
    call.send_content(stored[start:end])


def _header(size: int) -> bytes:
    """Version, stored size, compression, and size; sizes have three bytes."""
    short = struct.pack("<I", size)[:3]
    return b"\0" + short + b"\0" + short


def _content(call: Connection, oid: str) -> Path:
    """A large file of any repository that is served over Xet."""
    for repository in call.hub.repositories.values():
        if repository.xet:
            for commit in repository.commits.values():
                for file in commit.files.values():
                    if file.sha256 == oid:
                        return file.path
    raise Refusal(404, "The file does not exist.")


ROUTES: tuple[Route, ...] = (
    (r"/api/models/(?P<repo_id>[^/]+/[^/]+)/xet-read-token/(?P<revision>[^/]+)", ("GET",), get_token),
    (r"/_xet/v1/reconstructions/(?P<oid>[0-9a-f]{64})", ("GET",), get_reconstruction),
    (r"/_xorbs/(?P<oid>[0-9a-f]{64})", ("GET",), get_xorb),
)
