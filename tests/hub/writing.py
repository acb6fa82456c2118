"""Routes of the loopback Hub that write: repositories, branches and commits; and permissions."""

import base64
import json
import re
from fnmatch import fnmatch
from typing import Any
from urllib.parse import parse_qs

from hub.connection import Connection, Route
from hub.reading import API
from hub.repository import GITATTRIBUTES, Commit, Refusal, Repository, StoredFile, large_file, plain_file

# Files of this size are large ones, whatever they are called.
LARGE_BYTES = 10_000_000


def get_whoami(call: Connection) -> None:
    """Name, organizations and role of a token."""
    account = call.account()
    access = {"type": "access_token", "accessToken": {"displayName": "some token", "role": account.role}}
    orgs = [{"name": org} for org in account.orgs]
    call.send_json({"type": "user", "name": account.name, "orgs": orgs, "auth": access})


def get_auth_check(call: Connection, *, kind: str, repo_id: str, write: str) -> None:
    """Whether a token may read a repository, or write to it."""
    if write:
        call.writable(kind, repo_id)
    else:
        call.repository(kind, repo_id, for_files=True)
    call.send_json({})


def post_repository(call: Connection) -> None:
    """Makes a repository with one commit."""
    asked, account = call.read_json(), call.account()
    repo_id = f"{asked.get('organization') or account.name}/{asked['name']}"
    kind = f"{asked.get('type') or 'model'}s"
    url = f"{call.hub.url}/{repo_id}"
    with call.hub.lock:
        if (kind, repo_id) in call.hub.repositories and account.may_read(repo_id):
            call.send_json({"error": "You already created this model repo", "url": url}, status=409)
            return
        if not account.may_write(repo_id):
            namespace = repo_id.split("/")[0]
            raise Refusal(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
        repository = Repository(id=repo_id, kind=kind, private=asked.get("visibility") == "private")
        first = plain_file(call.hub.keep(GITATTRIBUTES))
        repository.record({".gitattributes": first}, ref="main", parent=None, title="initial commit")
        call.hub.repositories[kind, repo_id] = repository
    call.send_json({"url": url, "name": repo_id, "id": repo_id})


def post_branch(call: Connection, *, kind: str, repo_id: str, branch: str) -> None:
    """Creates a branch at a commit."""
    repository, asked = call.writable(kind, repo_id), call.read_json()
    with call.hub.lock:
        if branch in repository.refs:
            raise Refusal(409, f"Reference refs/heads/{branch} already exists")
        repository.refs[branch] = repository.at(asked.get("startingPoint", "main")).sha
    call.send_json({})


def post_yaml(call: Connection) -> None:
    """Validates the front matter of a card: here it only has to end."""
    lines = call.read_json()["content"].splitlines()
    if lines[:1] == ["---"] and "---" not in lines[1:]:
        call.send_json({"errors": [{"message": "the front matter has no end"}], "warnings": []}, status=400)
        return
    warnings = [] if lines[:1] == ["---"] else [{"message": "empty or missing yaml metadata in repo card"}]
    call.send_json({"errors": [], "warnings": warnings})


def post_preupload(call: Connection, *, kind: str, repo_id: str, revision: str) -> None:
    """For each file, whether it is large, whether it is ignored, and the current content."""
    proposes = "create_pr" in call.logged.query
    repository = call.repository(kind, repo_id) if proposes else call.writable(kind, repo_id)
    call.account()
    commit, asked = repository.at(revision), call.read_json()
    patterns = _lines(commit, ".gitattributes", r"(\S+) .*filter=lfs")
    ignored = asked["gitIgnore"].split() if "gitIgnore" in asked else _lines(commit, ".gitignore", r"(\S+)")
    answers = []
    for file in asked["files"]:
        name, present = file["path"], commit.files.get(file["path"])
        is_large = file["size"] >= LARGE_BYTES or any(fnmatch(name, pattern) for pattern in patterns)
        answers.append(
            {
                "path": name,
                "uploadMode": "lfs" if is_large else "regular",
                "shouldIgnore": any(fnmatch(name, pattern) for pattern in ignored),
                "oid": None if present is None else present.etag,
            }
        )
    call.send_json({"commitOid": commit.sha, "files": answers})


def _lines(commit: Commit, name: str, pattern: str) -> list[str]:
    """First group of every line of a file that matches."""
    if name not in commit.files:
        return []
    matches = (re.match(pattern, line) for line in commit.files[name].path.read_text().splitlines())
    return [match[1] for match in matches if match]


def post_commit(call: Connection, *, kind: str, repo_id: str, revision: str) -> None:
    """Adds and deletes files, all at once or not at all; or opens a pull request."""
    proposes = parse_qs(call.logged.query).get("create_pr") == ["1"]
    repository = call.repository(kind, repo_id) if proposes else call.writable(kind, repo_id)
    call.account()
    operations = [json.loads(line) for line in call.read_body().splitlines()]
    header = operations.pop(0)["value"]
    with call.hub.lock:
        if not proposes and (revision in repository.tags or revision not in repository.refs):
            raise Refusal(404, f"Invalid rev id: {revision}", code="RevisionNotFound")
        head = repository.at(revision)
        if header.get("parentCommit", head.sha) != head.sha:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for operation in operations:
            _apply(call, repository, files, operation["key"], operation["value"])
        number = 1 + sum(name.startswith("refs/pr/") for name in repository.refs)
        ref = f"refs/pr/{number}" if proposes else revision
        sha = repository.record(files, ref=ref, parent=head.sha, title=header["summary"])
    url = f"{call.hub.url}/{repo_id}"
    answer = {"success": True, "commitOid": sha, "commitUrl": f"{url}/commit/{sha}", "hookOutput": ""}
    call.send_json({**answer, "pullRequestUrl": f"{url}/discussions/{number}"} if proposes else answer)


def _apply(call: Connection, repository: Repository, files: dict[str, StoredFile], key: str, value: Any) -> None:
    """Applies one operation of a commit."""
    name = value["path"]
    match key:
        case "file":
            files[name] = plain_file(call.hub.keep(base64.b64decode(value["content"])))
        case "lfsFile":
            if value["oid"] not in repository.objects:
                raise Refusal(400, f"{name} points to content that was never uploaded")
            files[name] = large_file(repository.objects[value["oid"]], value["oid"])
        case "deletedFile":
            if files.pop(name, None) is None:
                raise Refusal(404, f"A file with this name doesn't exist: {name}", code="EntryNotFound")
        case "deletedFolder":
            for inside in [file for file in files if file.startswith(name)]:
                del files[inside]
        case _:
            raise Refusal(400, f"There is no operation {key}")


ROUTES: tuple[Route, ...] = (
    (r"/api/whoami-v2", ("GET",), get_whoami),
    (rf"{API}/auth-check(?P<write>/write)?", ("GET",), get_auth_check),
    (r"/api/repos/create", ("POST",), post_repository),
    (r"/api/validate-yaml", ("POST",), post_yaml),
    (rf"{API}/branch/(?P<branch>[^/]+)", ("POST",), post_branch),
    (rf"{API}/preupload/(?P<revision>[^/]+)", ("POST",), post_preupload),
    (rf"{API}/commit/(?P<revision>[^/]+)", ("POST",), post_commit),
)
