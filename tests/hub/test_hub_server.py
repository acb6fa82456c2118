"""The loopback Hub itself, queried by the real client: permissions, commits, and faults."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hub_client import FINE_GRAINED, OPENER, PUSHER, READER, STRANGER, WRITER, Answers, Call, Machine
from hub_server import Account, Fault, Hub, ListedFaults, RandomFaults

from hub.faults import PASSING
from hub.folders import SHARDS, read_folder, write_folder

DOWNLOADS = 6
# The client recovers from faults in a body, but requests the size of a file only once.
BODIES = r"/resolve/[0-9a-f]{40}/"
BODY_FAULTS = (Fault.CUT_ANSWER, Fault.LOST_ANSWER, Fault.SLOW, Fault.TOO_MANY_REQUESTS)


def api(method: str, token: str | None = WRITER, **arguments: Any) -> Call:
    return {"action": "api", "method": method, "token": token, **arguments}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("folder") / "model")


@pytest.fixture(scope="module")
def hub(folder: Path) -> Iterator[Hub]:
    accounts = {
        WRITER: Account(name="me", role="write", orgs=("team",)),
        READER: Account(name="me", role="read"),
        FINE_GRAINED: Account(name="me", role="fineGrained", opens=("me/one",)),
        OPENER: ("org/private", "org/gated"),
        STRANGER: (),
    }
    with Hub(tokens=accounts) as server:
        for name in ("private", "gated", *(f"model-{number}" for number in range(DOWNLOADS))):
            server.add(f"org/{name}", folder)
        server.model("org/private").private = True
        server.model("org/gated").gated = True
        for name in ("one", "two", "tree"):
            server.add(f"me/{name}", folder)
        faults = RandomFaults(1, rate=0.3, kinds=BODY_FAULTS, where=BODIES)
        server.faults = lambda method, path: faults(method, path) if method == "GET" else None
        yield server


@pytest.fixture(scope="module")
def answers(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    def check(repo_id: str, token: str, *, write: bool = False) -> Call:
        return api("auth_check", token, repo_id=repo_id, write=write)

    calls: Mapping[str, Call | list[Call]] = {
        "whoami": api("whoami"),
        "own": check("me/one", WRITER, write=True),
        "one": check("me/one", FINE_GRAINED, write=True),
        "private": check("org/private", OPENER),
        "gated": check("org/gated", OPENER),
        "branches": [
            api("create_branch", repo_id="me/tree", branch="dev"),
            api("delete_file", path_in_repo=SHARDS[0], repo_id="me/tree", revision="dev"),
            api("delete_folder", path_in_repo="nothing", repo_id="me/tree", revision="dev"),
            api("list_repo_files", repo_id="me/tree", revision="dev"),
            api("list_repo_files", repo_id="me/tree"),
        ],
        **{
            f"download {number}": {"action": "download", "repo_id": f"org/model-{number}"}
            for number in range(DOWNLOADS)
        },
    }
    return Machine(tmp_path_factory.mktemp("machine")).run(hub.url, calls, (PUSHER,))


def test_a_token_identifies_its_account(answers: Answers) -> None:
    assert "'name': 'me'" in answers["whoami"]
    assert "'orgs': [{'name': 'team'}]" in answers["whoami"]


@pytest.mark.parametrize("name", ["own", "one", "private", "gated"])
def test_a_token_opens_what_it_should(name: str, answers: Answers) -> None:
    assert answers[name] == "None"


@pytest.mark.parametrize(
    ("repo_id", "token", "write"),
    [
        ("org/private", STRANGER, False),
        ("org/gated", STRANGER, False),
        ("org/private", OPENER, True),
        ("me/one", READER, True),
        ("me/two", FINE_GRAINED, True),
    ],
)
def test_a_token_opens_nothing_else(repo_id: str, token: str, write: bool, hub: Hub) -> None:
    found = hub.find("models", repo_id, OPENER, for_files=False)
    account = hub.account(token)
    assert account is not None
    assert not (account.may_write(found.id) if write else account.may_read(found.id))


def test_a_commit_changes_its_branch_alone(hub: Hub, answers: Answers, folder: Path) -> None:
    *_, dev, main = answers["branches"]
    assert sorted(main) == sorted(read_folder(folder))
    assert sorted(dev) == sorted(read_folder(folder).keys() - {SHARDS[0]})


@pytest.mark.parametrize("number", range(DOWNLOADS))
def test_a_download_over_a_bad_connection_is_complete(number: int, answers: Answers, folder: Path) -> None:
    assert read_folder(Path(answers[f"download {number}"])) == read_folder(folder)


def test_downloads_recover_from_every_fault(hub: Hub, answers: Answers) -> None:
    met = [request.fault for request in hub.requests if request.fault is not None]
    assert set(met) == set(BODY_FAULTS)


def paths(seed: int, **how: Any) -> list[Fault | None]:
    plan = RandomFaults(seed, **how)
    return [plan("GET", f"/{number % 50}") for number in range(500)]


def test_faults_are_those_of_their_seed() -> None:
    assert paths(3, rate=0.2) == paths(3, rate=0.2)
    assert paths(3, rate=0.2) != paths(4, rate=0.2)


def test_faults_do_not_depend_on_other_requests() -> None:
    plan, alone = RandomFaults(3, rate=0.5), RandomFaults(3, rate=0.5)
    mixed = [plan("PUT", path) for _ in range(5) for path in ("/a", "/b")]
    assert mixed[::2] == [alone("PUT", "/a") for _ in range(5)]


def test_every_kind_of_fault_happens_and_none_too_often() -> None:
    found = paths(0, rate=0.9, most=3)
    assert set(found) == {None, *PASSING}
    assert sum(fault is not None for fault in found) == 150


def test_listed_faults_happen_once() -> None:
    plan = ListedFaults(("PUT", "/x", Fault.SLOW))
    assert [plan("GET", "/x"), plan("PUT", "/x/1"), plan("PUT", "/x/1")] == [None, Fault.SLOW, None]
