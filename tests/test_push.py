"""A result on its way to the Hub: the real client, in processes of its own, against a loopback server.

The client would send large files over Xet, which only the Hub speaks, so ``hub_client`` switches that off as a user
can: ``HF_HUB_DISABLE_XET=1``. Then it sends them over Git LFS.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hub.folders import SHARD_BYTES, SHARDS, read_folder, write_folder
from hub_client import (
    BROKEN,
    EXPIRED,
    FINE_GRAINED,
    OTHER_WRITER,
    PUSHER,
    READER,
    SECRETS,
    WRITER,
    Answers,
    Call,
    Machine,
)
from hub_server import Account, Fault, Hub, ListedFaults, Repository

FIRST_FILES = {".gitattributes"}
ENDLESS_CARD = "---\nlicense: mit\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("folders")


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return Machine(tmp_path_factory.mktemp("machine"))


@pytest.fixture(scope="module")
def hub(folder: Path) -> Iterator[Hub]:
    accounts = {
        WRITER: Account(name="me", role="write", orgs=("team",)),
        READER: Account(name="reader", role="read"),
        OTHER_WRITER: Account(name="other", role="write"),
        FINE_GRAINED: Account(name="me", role="fineGrained", opens=("me/only",)),
    }
    with Hub(tokens=accounts) as server:
        server.part_bytes = 2 * SHARD_BYTES // 3
        add_repositories(server, folder)
        server.faults = Meddling(server)
        yield server


class Meddling:
    """Loses the answers to some commits, and commits to ``me/raced`` before anybody else can."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        lost = ("me/lost/commit", "other/lost-pr/commit")
        self._lost = ListedFaults(*(("POST", path, Fault.LOST_ANSWER) for path in lost))

    def __call__(self, method: str, path: str) -> Fault | None:
        raced = self._hub.model("me/raced")
        if path.startswith("/api/models/me/raced/commit") and len(raced.commits) == 1:
            raced.record(raced.at("main").files, ref="main", parent=raced.refs["main"], title="faster")
        return self._lost(method, path)


def add_repositories(hub: Hub, folder: Path) -> None:
    """Adds repositories that are there before anybody pushes."""
    (folder / "empty").mkdir()
    (folder / "empty" / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
    for name in ("me/empty", "other/theirs", "me/raced", "me/disabled", "me/public", "other/lost-pr"):
        hub.add(name, folder / "empty")
    write_folder(folder / "old", seed=1)
    for name in ("me/old", "me/branches", "me/tagged"):
        hub.add(name, folder / "old")
    branched = hub.model("me/branches")
    branched.record({}, ref="draft", parent=None, title="nothing")
    tagged = hub.model("me/tagged")
    tagged.refs["v1"] = tagged.refs["main"]
    tagged.tags.add("v1")
    hub.model("me/disabled").disabled = True
    hub.quotas["me/full"] = 2 * SHARD_BYTES
    hub.failures["/_lfs/models/me/no-space"] = 507
    hub.failures["/api/models/me/down"] = 503


# What is pushed: one process for all, side by side

Calls = Mapping[str, Call]


def publish(folder: Path, repo_id: str, token: str | None = WRITER, **how: Any) -> Call:
    return {"action": "publish", "folder": str(folder), "repo_id": repo_id, "token": token, **how}


def sound_calls(folder: Path) -> dict[str, Call]:
    """Pushes that succeed."""
    result = folder / "result"
    return {
        "new": publish(result, "me/new"),
        "of an organization": publish(result, "team/new"),
        "private": publish(result, "me/private", private=True),
        "to an empty one": publish(result, "me/empty"),
        "pull request": publish(result, "other/theirs", create_pr=True),
        "new branch": publish(result, "me/fresh", revision="four-experts"),
        "old branch": publish(result, "me/branches", revision="draft"),
        "deleted": publish(write_folder(folder / "deleted"), "me/deleted", delete=True),
        "large": publish(folder / "large", "me/large"),
        "lost": publish(result, "me/lost"),
        "lost pull request": publish(result, "other/lost-pr", create_pr=True),
    }


# The call, what its message must say, and what its hint must say.
def refused_calls(folder: Path) -> dict[str, tuple[Call, str, str]]:
    result = folder / "result"
    full = "me/full: Storage limit reached."
    return {
        "no token": (publish(result, "me/x", None), "no access token was found", "'hf auth login' or pass `token`"),
        "broken token": (publish(result, "me/x", BROKEN), "contains invalid characters", "copy it again"),
        "expired token": (publish(result, "me/x", EXPIRED), "refused the access token for me/x", "hf auth login"),
        "reading token": (publish(result, "reader/x", READER), "of reader is read-only", "write access on"),
        "no namespace": (publish(result, "nobody/x"), "me cannot write to the namespace nobody", "me/x or team/x"),
        "not mine": (publish(result, "other/theirs"), "me cannot write to the namespace other", "push to me/theirs"),
        "fine-grained": (publish(result, "me/x", FINE_GRAINED), "cannot write to me/x", "write access to me"),
        "words": (publish(result, "me/two words"), "'me/two words' is not a repository id", "NAMESPACE/NAME"),
        "three parts": (publish(result, "me/a/b"), "'me/a/b' is not a repository id", "NAMESPACE/NAME"),
        "bare name": (publish(result, "model"), "'model' does not name a user or an organization", "NAMESPACE/model"),
        "taken": (
            publish(result, "me/old"),
            "me/old already holds 5 files: config.json, hcsmoe.json",
            "`overwrite=True`",
        ),
        "taken for a proposal": (
            publish(result, "me/old", create_pr=True),
            "me/old already holds 5 files",
            "`overwrite=True`",
        ),
        "branch from taken": (
            publish(result, "me/old", revision="new"),
            "(branch new) already holds 5 files",
            "`revision`",
        ),
        "tag": (publish(result, "me/tagged", revision="v1"), "v1 is a tag of me/tagged", "name a branch"),
        "commit": (publish(result, "me/old", revision="0" * 40), "is a commit of me/old", "name a branch"),
        "public": (publish(result, "me/public", private=True), "is public, but", "settings me/public --private"),
        "disabled": (publish(result, "me/disabled"), "me/disabled was disabled", "another repository"),
        "quota": (publish(result, "me/full"), f"not enough storage on the Hub for {full}", "billing"),
        "no space": (
            publish(result, "me/no-space"),
            "not enough storage on the Hub for me/no-space: 507",
            "run the same command again",
        ),
        "down": (publish(result, "me/down"), "temporarily unable to accept me/down: 503", "are not sent again"),
        "raced": (publish(result, "me/raced"), "me/raced was changed by someone else", "run the same command again"),
        "card": (publish(folder / "bad-card", "me/card"), "front matter of README.md: the front matter", "correct it"),
        "secret": (
            publish(folder / "secret", "me/secret"),
            "config.json contains your access token",
            "remove the token",
        ),
    }


@pytest.fixture(scope="module")
def answers(hub: Hub, machine: Machine, folder: Path) -> Answers:
    write_folder(folder / "result")
    write_folder(folder / "bad-card", {"README.md": ENDLESS_CARD})
    write_folder(folder / "secret", {"config.json": json.dumps({"note": WRITER})})
    write_folder(folder / "large")
    (folder / "large" / SHARDS[0]).write_bytes(bytes(range(256)) * 12_000)
    calls = sound_calls(folder) | {name: call for name, (call, _, _) in refused_calls(folder).items()}
    return machine.run(hub.url, calls, (PUSHER,))


@pytest.fixture(scope="module")
def files(folder: Path, answers: Answers) -> dict[str, bytes]:
    """What was pushed."""
    return read_folder(folder / "result")


def commits(repository: Repository) -> list[str]:
    """Titles of the commits of the default branch, newest first."""
    return [commit.title for commit in repository.history("main")]


@pytest.mark.parametrize("repo_id", ["me/new", "team/new", "me/private", "me/empty", "me/lost", "me/deleted"])
def test_everything_arrives_bit_for_bit_in_one_commit(
    repo_id: str, hub: Hub, answers: Answers, files: dict[str, bytes]
) -> None:
    contents = hub.model(repo_id).contents()
    assert {name: contents[name] for name in contents if name not in FIRST_FILES} == files
    assert len(commits(hub.model(repo_id))) == 2


def test_a_push_reports_what_it_did(hub: Hub, answers: Answers, files: dict[str, bytes]) -> None:
    pushed, total = answers["new"], sum(len(content) for content in files.values())
    assert pushed["commit"] == hub.model("me/new").refs["main"]
    assert pushed["url"] == f"{hub.url}/me/new/commit/{pushed['commit']}"
    assert (pushed["revision"], pushed["pull_request"], pushed["changed"]) == ("main", None, True)
    assert (pushed["files"], pushed["deleted"]) == (sorted(files), [])
    assert pushed["bytes"] == pushed["bytes_sent"] == total


def test_large_files_are_sent_once_and_in_parts(hub: Hub, answers: Answers) -> None:
    puts = [request for request in hub.requests if request.method == "PUT" and "/me/new/" in request.path]
    assert sorted(request.received for request in puts) == sorted([SHARD_BYTES // 3, 2 * SHARD_BYTES // 3] * 3)


def test_every_shard_is_reported_when_the_hub_holds_it(answers: Answers) -> None:
    delivered = [event for kind, event in answers["new"]["events"] if kind == "Delivered"]
    assert delivered == [{"file": shard, "file_bytes": SHARD_BYTES, "bytes_sent": SHARD_BYTES} for shard in SHARDS]


def test_a_large_shard_is_reported_while_it_is_sent(answers: Answers) -> None:
    sending = [event for kind, event in answers["large"]["events"] if kind == "Sending"]
    assert {(event["file"], event["file_bytes"]) for event in sending} == {(SHARDS[0], 256 * 12_000)}
    sent = [event["bytes_sent"] for event in sending]
    assert sent == sorted(set(sent))
    assert 1 < len(sent) < 4


def test_a_repository_is_private_where_that_is_asked_for(hub: Hub, answers: Answers) -> None:
    assert (hub.model("me/private").private, hub.model("me/new").private) == (True, False)
    assert (answers["private"]["private"], answers["new"]["private"]) == (True, False)


def test_shards_that_the_hub_holds_may_be_deleted_before_the_commit(folder: Path, answers: Answers) -> None:
    assert answers["deleted"]["changed"] is True
    assert [name for name in read_folder(folder / "deleted") if name.endswith(".safetensors")] == []


def test_a_pull_request_leaves_the_branch_alone(hub: Hub, answers: Answers, files: dict[str, bytes]) -> None:
    repository, pushed = hub.model("other/theirs"), answers["pull request"]
    assert set(repository.contents()) == FIRST_FILES
    proposed = repository.contents("refs/pr/1")
    assert {name: proposed[name] for name in files} == files
    assert (pushed["revision"], pushed["pull_request"]) == ("refs/pr/1", f"{hub.url}/other/theirs/discussions/1")


def test_a_branch_that_is_not_there_begins_empty(hub: Hub, answers: Answers, files: dict[str, bytes]) -> None:
    repository = hub.model("me/fresh")
    assert set(repository.contents()) == FIRST_FILES
    assert set(repository.contents("four-experts")) == FIRST_FILES | files.keys()


def test_a_branch_that_is_there_and_empty_is_used(hub: Hub, answers: Answers, folder: Path) -> None:
    repository = hub.model("me/branches")
    assert {name for name in repository.contents("draft") if name.endswith(".safetensors")} == set(SHARDS)
    assert repository.contents() == read_folder(folder / "old")


@pytest.mark.parametrize(("name", "repo_id"), [("lost", "me/lost"), ("lost pull request", "other/lost-pr")])
def test_a_commit_whose_answer_was_lost_is_not_made_twice(name: str, repo_id: str, hub: Hub, answers: Answers) -> None:
    repository = hub.model(repo_id)
    assert sum(request.path.startswith(f"/api/models/{repo_id}/commit/") for request in hub.requests) == 1
    assert len(repository.commits) == 2
    assert answers[name]["commit"] in repository.commits
    assert answers[name]["url"] == f"{hub.url}/{repo_id}/commit/{answers[name]['commit']}"
    assert answers[name]["revision"] in repository.refs


@pytest.mark.parametrize("name", refused_calls(Path()))
def test_a_push_is_refused_with(name: str, answers: Answers) -> None:
    _, message, hint = refused_calls(Path())[name]
    assert answers[name]["refused"] == "PushError"
    assert message in answers[name]["message"]
    assert hint in answers[name]["hint"]


def test_a_refusal_leaves_every_repository_as_it_was(hub: Hub, answers: Answers, folder: Path) -> None:
    assert hub.model("me/old").contents() == read_folder(folder / "old")
    assert set(hub.model("me/old").refs) == {"main"}
    assert ("models", "nobody/x") not in hub.repositories
    for name in ("me/full", "me/no-space", "me/card", "me/secret"):
        assert set(hub.model(name).contents()) == FIRST_FILES


def test_refusals_before_the_first_shard_send_nothing(hub: Hub, answers: Answers) -> None:
    for repo_id in ("me/old", "me/public", "me/tagged", "other/theirs"):
        batches = [request for request in hub.requests if request.path == f"/{repo_id}.git/info/lfs/objects/batch"]
        # The one that is proposed sends its three shards.
        assert len(batches) == (3 if repo_id == "other/theirs" else 0)


def test_no_token_is_in_an_address_or_in_a_repository(hub: Hub, answers: Answers) -> None:
    seen = [f"{request.path}?{request.query}" for request in hub.requests]
    titles = [commit.title for repository in hub.repositories.values() for commit in repository.commits.values()]
    contents = [
        content
        for repository in hub.repositories.values()
        for ref in repository.refs
        for content in repository.contents(ref).values()
    ]
    assert len(contents) > 50
    assert [secret for secret in SECRETS for text in (*seen, *titles) if secret in text] == []
    assert [secret for secret in SECRETS for content in contents if secret.encode() in content] == []
