"""Routes of the loopback Hub that read: what it knows of a repository, its trees and its files."""

import re
from urllib.parse import parse_qs

from hub import xet
from hub.connection import BLOCK_BYTES, Connection, Route
from hub.repository import Refusal, StoredFile


def get_info(call: Connection, *, kind: str, repo_id: str, revision: str) -> None:
    """What the Hub knows about a repository at one commit."""
    repository = call.repository(kind, repo_id)
    commit = repository.at(revision or "main")
    flags = {"private": repository.private, "gated": "auto" if repository.gated else False, "disabled": False}
    siblings = [{"rfilename": name} for name in commit.files]
    call.send_json({"id": repository.id, "sha": commit.sha, **flags, "siblings": siblings})


def get_tree(call: Connection, *, kind: str, repo_id: str, revision: str, folder: str) -> None:
    """The files in a folder and in all its sub-folders; the folders are not listed."""
    files = call.repository(kind, repo_id).at(revision).files
    prefix = f"{folder}/" if folder else ""
    entries = [_entry(name, file) for name, file in files.items() if name.startswith(prefix)]
    if folder and not entries:
        raise Refusal(404, f"{folder} does not exist on {revision}", code="EntryNotFound")
    call.send_json(entries)


def post_paths_info(call: Connection, *, kind: str, repo_id: str, revision: str) -> None:
    """The entries of the files that the body names; the others are left out."""
    commit = call.repository(kind, repo_id).at(revision)
    names = parse_qs(call.read_body().decode()).get("paths", [])
    call.send_json([_entry(name, commit.files[name]) for name in names if name in commit.files])


def get_refs(call: Connection, *, kind: str, repo_id: str) -> None:
    """Branches, tags, and pull requests if they are asked for."""
    repository = call.repository(kind, repo_id)
    found: dict[str, list[dict[str, str]]] = {"branches": [], "tags": [], "converts": [], "pullRequests": []}
    for name, sha in repository.refs.items():
        group = "pullRequests" if name.startswith("refs/pr/") else "tags" if name in repository.tags else "branches"
        full = {"pullRequests": name, "tags": f"refs/tags/{name}", "branches": f"refs/heads/{name}"}[group]
        found[group].append({"name": name, "ref": full, "targetCommit": sha})
    if "include_prs" not in call.logged.query:
        del found["pullRequests"]
    call.send_json(found)


def get_commits(call: Connection, *, kind: str, repo_id: str, revision: str) -> None:
    """The commits of a branch, newest first."""
    repository = call.repository(kind, repo_id)
    fixed = {"authors": [{"user": "someone"}], "date": "2026-01-01T00:00:00.000Z", "message": ""}
    call.send_json([{"id": commit.sha, "title": commit.title, **fixed} for commit in repository.history(revision)])


def get_file(call: Connection, *, kind: str, repo_id: str, revision: str, name: str) -> None:
    """A file, or the part of it that ``Range`` names."""
    repository = call.repository(kind.rstrip("/") or "models", repo_id, for_files=True)
    commit = repository.at(revision)
    headers = {"X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
    if name not in commit.files:
        raise Refusal(404, "Entry not found", code="EntryNotFound", headers=headers)
    file = commit.files[name]
    if repository.xet and file.sha256:
        headers |= xet.headers_of(call, repo_id, commit.sha, file)
    part = _part(call.logged.range, file.size)
    headers |= {"ETag": f'"{file.etag}"', "Content-Length": str(len(part))}
    if call.logged.range is None:
        call.send_head(200, headers)
    else:
        call.send_head(206, {**headers, "Content-Range": f"bytes {part.start}-{part.stop - 1}/{file.size}"})
    if call.command == "HEAD":
        return
    with file.path.open("rb") as content:
        content.seek(part.start)
        for start in range(part.start, part.stop, BLOCK_BYTES):
            call.send_content(content.read(min(BLOCK_BYTES, part.stop - start)))


def _entry(name: str, file: StoredFile) -> dict[str, object]:
    large = {"lfs": {"oid": file.sha256, "size": file.size, "pointerSize": 134}} if file.sha256 else {}
    return {"type": "file", "path": name, "size": file.size, "oid": file.oid, **large}


def _part(header: str | None, size: int) -> range:
    """Positions that a ``Range`` header names, as in ``bytes=2-5`` or ``bytes=2-``."""
    if header is None:
        return range(size)
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", header)
    part = range(int(match[1]), min(int(match[2] or size) + 1, size)) if match else range(0)
    if not part:
        raise Refusal(416, f"{header} is not a range of the file.", headers={"Content-Range": f"bytes */{size}"})
    return part


API = r"/api/(?P<kind>models|datasets)/(?P<repo_id>[^/]+/[^/]+)"
ROUTES: tuple[Route, ...] = (
    (rf"{API}(?:/revision/(?P<revision>[^/]+))?", ("GET",), get_info),
    (rf"{API}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", ("GET",), get_tree),
    (rf"{API}/paths-info/(?P<revision>[^/]+)", ("POST",), post_paths_info),
    (rf"{API}/refs", ("GET",), get_refs),
    (rf"{API}/commits/(?P<revision>[^/]+)", ("GET",), get_commits),
    (
        r"/(?P<kind>datasets/)?(?P<repo_id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)",
        ("GET", "HEAD"),
        get_file,
    ),
)
