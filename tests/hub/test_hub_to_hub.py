"""From Hub to Hub with an empty cache: downloaded, converted and pushed by one command, and loaded elsewhere."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_client import SECRETS, WRITER, Machine
from hub_server import Fault

from hcsmoe_hub import SourceError
from hcsmoe_hub.checkpoint.unfinished import UNFINISHED
from hcsmoe_hub.result.verify import verify
from hub.journey import CONVERTER, SHARD_BYTES, Journey, make_hub, measuring_disk

NORMAL, LOW = "me/model-4e", "me/low-4e"
# Blocks of the file system, folders, and small files; weights are far more.
SMALL_BYTES = 250_000
DEADLINE_SECONDS = 60
LOADER = """
import sys
import torch
from transformers import AutoModelForCausalLM

first, *others = (AutoModelForCausalLM.from_pretrained(name).state_dict() for name in sys.argv[1:])
assert all(first.keys() == other.keys() for other in others)
print(all(torch.equal(first[name], other[name]) for other in others for name in first))
"""


@pytest.fixture
def journey(tmp_path: Path) -> Iterator[Journey]:
    with make_hub() as hub:
        yield Journey.prepare(tmp_path, hub)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Journey]:
    """A completed journey."""
    with make_hub() as hub:
        journey = Journey.prepare(tmp_path_factory.mktemp("done"), hub)
        finished = journey.run(NORMAL)
        assert finished.returncode == 0, finished.stderr
        yield journey


@pytest.fixture(scope="module")
def low(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Journey, int]]:
    """A journey on little disk, and how much disk it took."""
    with make_hub() as hub:
        journey = Journey.prepare(tmp_path_factory.mktemp("low"), hub)
        with measuring_disk(journey.machine.folder) as most:
            finished = journey.run(LOW, "--low-disk", "--json")
        assert finished.returncode == 0, finished.stderr
        document = json.loads(finished.stdout)
        assert document["output"] is None
        assert document["pushed"]["repo_id"] == LOW
        yield journey, most[0]


def test_what_is_loaded_from_the_hub_is_what_was_converted(done: Journey, tmp_path: Path) -> None:
    local = str(done.machine.folder / "model-hcsmoe-4e")
    elsewhere = Machine(tmp_path).environment(done.hub.url)
    loading = [sys.executable, "-c", LOADER, local, NORMAL]
    found = subprocess.run(loading, env=elsewhere, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "True\n"), found.stderr


def test_both_ways_lead_to_the_same_files(done: Journey, low: tuple[Journey, int]) -> None:
    journey, _ = low
    assert done.visible(NORMAL) == journey.visible(LOW) != {}
    shards = {name: content for name, content in done.visible(NORMAL).items() if name.endswith(".safetensors")}
    local = done.machine.folder / "model-hcsmoe-4e"
    assert shards == {file.name: file.read_bytes() for file in local.glob("*.safetensors")}
    assert len(shards) > 3


def test_a_card_names_the_repository(done: Journey) -> None:
    card = done.hub.model(NORMAL).contents()["README.md"].decode()
    assert f'from_pretrained("{NORMAL}"' in card
    assert "base_model: org/model" in card


def test_every_byte_of_the_source_is_downloaded_once(done: Journey, low: tuple[Journey, int]) -> None:
    sizes = {name: len(content) for name, content in done.shards().items()}
    assert done.downloaded() == sizes
    journey, _ = low
    headers = {name: 8 + int.from_bytes(content[:8], "little") for name, content in journey.shards().items()}
    assert journey.downloaded() == {name: sizes[name] - headers[name] for name in sizes}


def test_little_disk_is_two_layers_and_a_shard(low: tuple[Journey, int]) -> None:
    journey, most = low
    source = sum(map(len, journey.shards().values()))
    layers = source / 2
    assert most < layers + SHARD_BYTES + SMALL_BYTES < source
    assert [
        file for file in journey.machine.folder.rglob("*") if "safetensors" in file.name and "index" not in file.name
    ] == []
    assert not (journey.machine.folder / "model-hcsmoe-4e").exists()


def test_the_token_is_never_shown(done: Journey, low: tuple[Journey, int]) -> None:
    journey, _ = low
    texts = [*done.hub.model(NORMAL).contents().values(), *journey.hub.model(LOW).contents().values()]
    texts += [file.read_bytes() for file in done.machine.folder.rglob("*") if file.is_file()]
    assert [secret for secret in SECRETS if any(secret.encode() in text for text in texts)] == []
    assert all(WRITER not in request.path + request.query for request in done.hub.requests)


def test_the_same_command_again_sends_nothing_twice(low: tuple[Journey, int]) -> None:
    journey, _ = low
    before = journey.visible(LOW)
    again = journey.run(LOW, "--low-disk")
    assert again.returncode == 0, again.stderr
    assert journey.visible(LOW) == before
    assert set(journey.arrivals().values()) == {1}


def files_of(result: Path) -> dict[str, bytes]:
    """The files of a result, without what is kept while it is not pushed."""
    return {path.name: path.read_bytes() for path in result.iterdir() if path.is_file()}


class HoldOne:
    """Holds one of the requests that match, counted from 0."""

    def __init__(self, method: str, pattern: str, number: int) -> None:
        self._method, self._pattern, self._left = method, pattern, number

    def __call__(self, method: str, path: str) -> Fault | None:
        if method != self._method or not re.search(self._pattern, path):
            return None
        self._left -= 1
        return Fault.HELD if self._left == -1 else None


@pytest.mark.parametrize(
    ("method", "pattern", "number", "words", "sent"),
    [
        pytest.param("PUT", "/_lfs/", 2, [], 0, id="third shard"),
        pytest.param("PUT", "/_lfs/", 0, ["--low-disk"], 0, id="first shard, low disk"),
        pytest.param("POST", "/preupload/", 1, ["--low-disk"], 1, id="second question, low disk"),
        pytest.param("POST", "/verify", 1, ["--low-disk"], 1, id="second receipt, low disk"),
        pytest.param("PUT", "/_lfs/", 2, ["--low-disk"], 2, id="third shard, low disk"),
        pytest.param("POST", "/commit/main", 0, ["--low-disk"], 5, id="commit, low disk"),
    ],
)
def test_a_killed_journey_publishes_nothing_and_the_next_resumes_it(
    journey: Journey, done: Journey, method: str, pattern: str, number: int, words: list[str], sent: int
) -> None:
    hub = journey.hub
    hub.faults = HoldOne(method, pattern, number)
    process = journey.start(NORMAL, *words)
    assert hub.held.wait(DEADLINE_SECONDS)
    process.kill()
    process.communicate()
    hub.released.set()
    assert journey.visible(NORMAL) == {}
    # Of what was deleted, a record was kept before.
    assert len(journey.kept("sent")) == sent
    again = journey.run(NORMAL, *words)
    assert again.returncode == 0, again.stderr
    assert journey.visible(NORMAL) == done.visible(NORMAL)
    assert set(journey.arrivals().values()) == {1}


@pytest.mark.parametrize("ends", [signal.SIGKILL, None], ids=["killed", "failed"])
def test_the_same_command_pushes_a_complete_result_without_converting_again(
    journey: Journey, done: Journey, ends: int | None
) -> None:
    result, hub = journey.machine.folder / "model-hcsmoe-4e", journey.hub
    if ends is None:
        hub.failures["/api/models/me/model-4e/commit/main"] = 500
        assert journey.run(NORMAL).returncode == 1
        hub.failures.clear()
    else:
        hub.faults = HoldOne("POST", "/commit/main", 0)
        process = journey.start(NORMAL)
        assert hub.held.wait(DEADLINE_SECONDS)
        process.send_signal(ends)
        process.communicate()
        hub.released.set()
    assert journey.visible(NORMAL) == {}
    # What is there is a model already.
    verify(result)
    assert [path.name for path in result.iterdir() if path.is_dir()] == [UNFINISHED]
    before, downloaded = files_of(result), journey.downloaded()
    other = journey.run(None, "--seed", "7")
    assert other.returncode == 1
    assert "holds a complete result" in other.stderr
    again = journey.run(NORMAL)
    assert again.returncode == 0, again.stderr
    assert journey.downloaded() == downloaded
    assert journey.visible(NORMAL) == done.visible(NORMAL)
    assert set(journey.arrivals().values()) == {1}
    assert files_of(result) == before
    assert not (result / UNFINISHED).exists()
    assert journey.run(NORMAL).returncode == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_push_that_is_stopped_says_how_it_goes_on(journey: Journey, done: Journey, number: int) -> None:
    journey.hub.faults = HoldOne("POST", "/commit/main", 0)
    process = journey.start(NORMAL)
    assert journey.hub.held.wait(DEADLINE_SECONDS)
    process.send_signal(number)
    _, errors = process.communicate(timeout=DEADLINE_SECONDS)
    journey.hub.released.set()
    assert process.returncode == 130
    assert "Interrupted; the result is complete, but not pushed." in errors
    assert f"push it with 'hcsmoe push model-hcsmoe-4e {NORMAL}'" in errors
    assert (journey.machine.folder / "model-hcsmoe-4e" / "model.safetensors.index.json").exists()
    assert journey.visible(NORMAL) == {}
    again = journey.run(NORMAL)
    assert again.returncode == 0, again.stderr
    assert journey.visible(NORMAL) == done.visible(NORMAL)


def test_shards_that_were_sent_away_bind_the_conversion_to_their_repository(journey: Journey) -> None:
    journey.hub.faults = HoldOne("PUT", "/_lfs/", 2)
    process = journey.start(LOW, "--low-disk")
    assert journey.hub.held.wait(DEADLINE_SECONDS)
    process.kill()
    process.communicate()
    journey.hub.released.set()
    for target, words in (("me/another", ["--low-disk"]), (LOW, []), (None, [])):
        refused = journey.run(target, *words)
        assert refused.returncode == 1
        text = " ".join(refused.stderr.split())
        assert f"2 shards of the interrupted conversion were sent to {LOW} and deleted here" in text
        assert f"push to {LOW} with --low-disk, or begin anew with --restart" in text
        assert "Then:" not in text
    anew = journey.run("me/another", "--low-disk", "--restart")
    assert anew.returncode == 0, anew.stderr
    assert len(journey.visible("me/another")) > len(journey.visible(LOW)) == 0


def test_a_push_that_fails_keeps_the_local_result(journey: Journey) -> None:
    journey.hub.failures["/api/models/me/model-4e/commit/main"] = 500
    failed = journey.run(NORMAL, HCSMOE_DEBUG="1")
    assert failed.returncode == 1
    assert "Traceback" in failed.stderr
    assert "The result itself is complete: model-hcsmoe-4e." in failed.stderr
    assert f"hcsmoe push model-hcsmoe-4e {NORMAL}" in failed.stderr
    assert journey.visible(NORMAL) == {}
    assert (journey.machine.folder / "model-hcsmoe-4e" / "model.safetensors.index.json").exists()
    journey.hub.failures.clear()
    # The hinted command works, and sends only what is missing.
    pushed = subprocess.run(
        [sys.executable, CONVERTER, "push", "model-hcsmoe-4e", NORMAL, "--json"],
        env=journey.machine.environment(journey.hub.url, HF_TOKEN=WRITER),
        cwd=journey.machine.folder,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(pushed.stdout)["changed"] is True
    assert not (journey.machine.folder / "model-hcsmoe-4e" / UNFINISHED).exists()
    assert set(journey.arrivals().values()) == {1}
    assert f'from_pretrained("{NORMAL}"' in journey.hub.model(NORMAL).contents()["README.md"].decode()


def test_a_result_can_be_proposed_to_a_private_repository(journey: Journey) -> None:
    proposed = journey.run(NORMAL, "--private", "--create-pr", "--json")
    assert proposed.returncode == 0, proposed.stderr
    pushed = json.loads(proposed.stdout)["pushed"]
    assert (pushed["private"], pushed["revision"]) == (True, "refs/pr/1")
    assert pushed["pull_request"].endswith(f"/{NORMAL}/discussions/1")
    assert journey.hub.model(NORMAL).private
    assert journey.visible(NORMAL) == {}


def test_a_push_that_fails_on_little_disk_leaves_nothing_that_looks_finished(journey: Journey) -> None:
    journey.hub.failures["/api/models/me/low-4e/commit/main"] = 500
    failed = journey.run(LOW, "--low-disk")
    assert failed.returncode == 1
    assert "run the same command again" in failed.stderr
    assert journey.visible(LOW) == {}
    output = journey.machine.folder / "model-hcsmoe-4e"
    # What a later run goes on with; neither transformers nor this command takes it for a result.
    assert [each.name for each in output.iterdir()] == [UNFINISHED]
    with pytest.raises(SourceError, match="unfinished"):
        verify(output)


def test_a_repository_that_holds_something_else_is_refused_before_the_model_runs(
    journey: Journey, done: Journey
) -> None:
    journey.hub.add(NORMAL, done.machine.folder / "model-hcsmoe-4e")
    held = journey.hub.model(NORMAL)
    refused = journey.run(NORMAL, "--seed", "7")
    assert refused.returncode == 1
    assert "me/model-4e already holds" in refused.stderr
    assert "--overwrite" in refused.stderr
    assert journey.downloaded() == {}
    assert len(held.commits) == 1


def test_shards_that_leave_the_cache_after_the_plan_are_downloaded_again(journey: Journey) -> None:
    machine = journey.machine
    found = subprocess.run(
        [sys.executable, Path(__file__).with_name("loser.py"), "org/model", "ids.npy", "result"],
        env=machine.environment(journey.hub.url),
        cwd=machine.folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.stdout.splitlines() == ["4 experts"], found.stderr
