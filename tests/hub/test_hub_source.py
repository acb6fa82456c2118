"""A checkpoint on the Hub: the real client against a loopback server.

The calls are made on a machine of ``hub_client``: one process on an empty machine, one later with the cache it left,
one without the Hub.
"""

import json
import socket
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_client import OPENER, STRANGER, Answers, Call, Machine, plan
from hub_server import Hub, Request
from places import EXAMPLE
from safetensors.torch import save_file

from hcsmoe_hub.checkpoint.source import LocalSource
from hcsmoe_hub.checkpoint.tensors import FIRST_READ_BYTES, INDEX_FILE, SINGLE_FILE
from hub.refusals import CUT, LAST_SHARD, REFUSALS, SHARD_BYTES, SHARDS

# A result copies all of them; of the README, only what its own card repeats.
READ_FILES = sorted(file.name for file in EXAMPLE.iterdir())

# Answers of a later process, and the requests that it made.
LaterRun = tuple[Answers, list[Request]]


def variant(folder: Path, **changes: bytes | None) -> Path:
    """The example with some files changed, or left out where the change is ``None``."""
    folder.mkdir()
    for file in EXAMPLE.iterdir():
        if file.name not in changes:
            (folder / file.name).symlink_to(file)
    for name, content in changes.items():
        if content is not None:
            (folder / name).write_bytes(content)
    return folder


def config(experts_per_token: int) -> bytes:
    settings = json.loads((EXAMPLE / "config.json").read_text()) | {"num_experts_per_tok": experts_per_token}
    return json.dumps(settings).encode()


def index(shard: str) -> bytes:
    """The example's index with its second shard renamed."""
    return (EXAMPLE / INDEX_FILE).read_bytes().replace(SHARDS[1].encode(), shard.encode())


def add_sound_repositories(hub: Hub, folder: Path) -> None:
    """Adds repositories that can be opened."""
    for name in ("tiny", "planned", "whole", "partial", "lean", "named"):
        hub.add(f"org/{name}", EXAMPLE)
    hub.add("org/private", EXAMPLE).private = True
    hub.add("org/gated", EXAMPLE).gated = True
    hub.renamed["org/former"] = "org/named"
    versions = hub.add("org/versions", EXAMPLE)
    versions.commit(variant(folder / "dev", **{"config.json": config(1)}), ref="dev")
    versions.commit(variant(folder / "v1", **{"config.json": config(3)}), ref="v1")
    versions.commit(variant(folder / "request", **{"config.json": config(4)}), ref="refs/pr/1")
    (folder / "long").mkdir()
    save_file(
        {f"{'long' * 10}.{number}": torch.tensor(number) for number in range(1500)}, folder / "long" / SINGLE_FILE
    )
    hub.add("org/long-header", folder / "long")
    hub.add("org/no-index", variant(folder / "no-index", **{INDEX_FILE: None}))


def add_faulty_repositories(hub: Hub, folder: Path) -> None:
    """Adds repositories that must be refused."""
    no_weights = dict.fromkeys((*SHARDS, INDEX_FILE))
    hub.add("org/disabled", EXAMPLE).disabled = True
    hub.add("org/failing", EXAMPLE)
    hub.failures["/api/models/org/failing"] = 500
    hub.add("org/bin-only", variant(folder / "bin", **no_weights, **{"pytorch_model.bin": b"PK"}))
    hub.add("org/gguf-only", variant(folder / "gguf", **no_weights, **{"config.json": None, "model.Q4.gguf": b"GGUF"}))
    hub.add("org/bare", variant(folder / "bare", **{"config.json": None}))
    hub.add("org/texts", EXAMPLE, kind="datasets")
    hub.add("org/lost-shard", variant(folder / "lost", **{SHARDS[1]: None}))
    hub.add("org/gap", variant(folder / "gap", **{INDEX_FILE: None, SHARDS[1]: None}))
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4' * 64}\nsize 2727464\n"
    hub.add("org/pointer", variant(folder / "pointer", **{SHARDS[1]: pointer.encode()}))
    hub.add("org/outside", variant(folder / "outside", **{INDEX_FILE: index("../../x.safetensors")}))
    hub.add("org/truncated", variant(folder / "truncated", **{SHARDS[1]: LAST_SHARD[:-CUT]}))


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    folder = tmp_path_factory.mktemp("repositories")
    with Hub(tokens={OPENER: ("org/private", "org/gated"), STRANGER: ()}) as server:
        add_sound_repositories(server, folder)
        add_faulty_repositories(server, folder)
        yield server


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    folder = tmp_path_factory.mktemp("machine")
    np.save(folder / "ids.npy", np.random.default_rng(0).integers(0, 4096, size=(4, 32)))
    (folder / "file").touch()
    return Machine(folder)


# The calls: one process on an empty machine, one later with the cache it left, one without the Hub

REVISIONS: Mapping[str, tuple[str, Call, int]] = {
    "the default branch": ("main", plan("org/versions"), 2),
    "a branch": ("dev", plan("org/versions", revision="dev"), 1),
    "a tag": ("v1", plan("org/versions", revision="v1"), 3),
    "a pull request": ("refs/pr/1", plan("org/versions", revision="refs/pr/1"), 4),
    "a uri": ("main", plan("hf://org/versions"), 2),
    "a uri with a branch": ("dev", plan("hf://org/versions@dev"), 1),
    "a name with a tag": ("v1", plan("org/versions@v1"), 3),
    "an address": ("main", plan("https://huggingface.co/org/versions"), 2),
    "an address of a branch": ("dev", plan("HTTPS://hf.co/org/versions/tree/dev/"), 1),
    "an address of a file": ("v1", plan("huggingface.co/org/versions/blob/v1/config.json?download=true"), 3),
    "an address of a pull request": ("refs/pr/1", plan("https://huggingface.co/org/versions/tree/refs%2Fpr%2F1"), 4),
    "the same revision twice": ("v1", plan("org/versions@v1", revision="v1"), 3),
}


@pytest.fixture(scope="module")
def first_run(hub: Hub, machine: Machine) -> Answers:
    """All calls on an empty machine, without a token in the environment."""
    calls: dict[str, Call] = {
        "planned": plan("org/planned"),
        "a commit": plan("org/versions", revision=hub.repositories["models", "org/versions"].refs["dev"]),
        "converted": machine.convert("org/tiny", "from-hub"),
        "converted locally": machine.convert(str(EXAMPLE), "from-folder"),
        "lean": {**machine.convert("org/lean", "lean"), "low_disk": True},
        "planned lean": {**plan("org/lean"), "low_disk": True},
        "former": plan("org/former"),
        "private": plan("org/private", token=OPENER),
        "gated": plan("org/gated", token=OPENER),
        "long header": {"action": "open", "source": "org/long-header"},
        "no index": {"action": "open", "source": "org/no-index"},
        "own cache": plan("org/versions", cache_dir="own-cache"),
        "whole": {"action": "download", "source": "org/whole", "ignore_patterns": ["*.md"]},
        "partial": {"action": "download", "source": "org/partial", "ignore_patterns": [SHARDS[1]]},
    }
    calls |= {name: call for name, (_, call, _) in REVISIONS.items()}
    calls |= {name: call for name, (call, _, _) in REFUSALS.items()}
    return machine.run(hub.url, calls)


@pytest.fixture(scope="module")
def second_run(hub: Hub, machine: Machine, first_run: Answers) -> LaterRun:
    """The same machine later, with a stored login."""
    before = len(hub.requests)
    calls = {"converted": machine.convert("org/tiny", "again"), "private": plan("org/private")}
    answers = machine.run(hub.url, calls, HF_TOKEN=OPENER)
    return answers, hub.requests[before:]


@pytest.fixture(scope="module")
def offline_run(hub: Hub, machine: Machine, first_run: Answers) -> LaterRun:
    """The same machine in offline mode."""
    before = len(hub.requests)
    calls = {
        "converted": machine.convert("org/tiny", "offline"),
        "by commit": plan("org/tiny", revision=first_run["converted"]["revision"]),
        "files": {"action": "files", "source": "org/tiny"},
        "whole": plan("org/whole"),
        "org/unknown": plan("org/unknown"),
        "org/planned": plan("org/planned"),
        "org/partial": plan("org/partial"),
        "org/tiny": plan("org/tiny", revision="dev"),
    }
    answers = machine.run(hub.url, calls, HF_HUB_OFFLINE="1")
    return answers, hub.requests[before:]


def file_requests(requests: list[Request], repo_id: str) -> list[tuple[str, Request]]:
    """Requests for content of a repository, each with the name of the file."""
    start = f"/{repo_id}/resolve/"
    gets = [request for request in requests if request.method == "GET" and request.path.startswith(start)]
    return [(request.path.removeprefix(start).partition("/")[2], request) for request in gets]


def test_planning_from_the_hub_downloads_no_shard(hub: Hub, first_run: Answers) -> None:
    requests = file_requests(hub.requests, "org/planned")
    whole = {name: request.sent for name, request in requests if request.range is None}
    parts = [(name, request.sent) for name, request in requests if request.range is not None]
    assert whole == {name: (EXAMPLE / name).stat().st_size for name in ("config.json", INDEX_FILE)}
    assert parts == [(shard, FIRST_READ_BYTES) for shard in SHARDS]
    assert first_run["planned"]["download_bytes"] == SHARD_BYTES


def test_a_plan_is_of_one_commit(hub: Hub, first_run: Answers) -> None:
    commit = hub.repositories["models", "org/planned"].refs["main"]
    assert first_run["planned"]["commit"] == commit
    requests = [request for request in hub.requests if request.path.startswith("/org/planned/resolve/")]
    assert requests
    assert all(request.path.startswith(f"/org/planned/resolve/{commit}/") for request in requests)


def test_a_header_longer_than_the_first_request_takes_one_more(hub: Hub, first_run: Answers) -> None:
    files = next(iter(hub.repositories["models", "org/long-header"].commits.values())).files
    expected = LocalSource(files[SINGLE_FILE].path.parent).tensors
    data_start = min(tensor.offset for tensor in expected.values())
    requested = [request.range for _, request in file_requests(hub.requests, "org/long-header")]
    assert requested == [f"bytes=0-{FIRST_READ_BYTES - 1}", f"bytes=8-{data_start - 1}"]
    assert first_run["long header"] == {name: [tensor.shard, tensor.offset] for name, tensor in expected.items()}


def test_shards_without_an_index_are_read(first_run: Answers) -> None:
    expected = LocalSource(EXAMPLE).tensors
    assert first_run["no index"] == {name: [tensor.shard, tensor.offset] for name, tensor in expected.items()}


def test_conversion_from_the_hub_equals_that_of_the_local_folder(machine: Machine, first_run: Answers) -> None:
    weights = machine.weights("from-hub")
    assert weights
    assert weights == machine.weights("from-folder")


def test_the_report_names_the_repository_and_the_commit(hub: Hub, first_run: Answers) -> None:
    commit = hub.repositories["models", "org/tiny"].refs["main"]
    found = first_run["converted"]
    assert (found["repo_id"], found["revision"], found["model_type"]) == ("org/tiny", commit, "mixtral")


def test_a_conversion_downloads_every_file_once_after_the_headers(hub: Hub, first_run: Answers) -> None:
    requests = file_requests(hub.requests, "org/tiny")
    headers = [(name, FIRST_READ_BYTES) for name in SHARDS]
    sent = [(name, request.sent) for name, request in requests]
    assert sorted(sent) == sorted([*headers, *((name, (EXAMPLE / name).stat().st_size) for name in READ_FILES)])


def test_a_conversion_with_little_disk_gives_the_same_result_and_keeps_no_shard(
    machine: Machine, first_run: Answers
) -> None:
    assert machine.weights("lean") == machine.weights("from-hub")
    kept = machine.folder / "home" / "hub" / "models--org--lean"
    assert [path for path in kept.rglob("*") if "safetensors" in path.name] == [*kept.rglob(INDEX_FILE)]
    assert not (kept / "hcsmoe").exists()


def test_a_plan_states_what_the_download_takes_on_disk(first_run: Answers) -> None:
    assert first_run["planned"]["cache_bytes"] == first_run["planned"]["download_bytes"] == SHARD_BYTES
    lean = first_run["planned lean"]
    tensors = LocalSource(EXAMPLE).tensors.values()
    assert lean["download_bytes"] == sum(tensor.nbytes for tensor in tensors)
    # Of four layers that are nearly alike, and the embeddings.
    assert lean["download_bytes"] // 3 < lean["cache_bytes"] < lean["download_bytes"] // 2


def test_another_cache_folder_is_used_when_it_is_given(machine: Machine, first_run: Answers) -> None:
    assert first_run["own cache"]["download_bytes"] == SHARD_BYTES
    assert list((machine.folder / "own-cache" / "models--org--versions").rglob("config.json"))


def test_a_second_conversion_takes_every_file_from_the_cache(machine: Machine, second_run: LaterRun) -> None:
    assert file_requests(second_run[1], "org/tiny") == []
    assert machine.weights("again") == machine.weights("from-hub")


def test_offline_mode_converts_what_an_earlier_conversion_left(machine: Machine, offline_run: LaterRun) -> None:
    assert offline_run[0]["converted"]["repo_id"] == "org/tiny"
    assert machine.weights("offline") == machine.weights("from-hub")
    assert (machine.folder / "offline" / "tokenizer.json").exists()


def test_offline_mode_finds_the_readme_that_an_earlier_conversion_read(offline_run: LaterRun) -> None:
    assert "README.md" in offline_run[0]["files"]


def test_offline_mode_makes_no_request(offline_run: LaterRun) -> None:
    assert offline_run[1] == []


def test_offline_mode_finds_a_commit_in_the_cache(first_run: Answers, offline_run: LaterRun) -> None:
    assert offline_run[0]["by commit"]["commit"] == first_run["converted"]["revision"]
    assert offline_run[0]["by commit"]["download_bytes"] == 0


def test_offline_mode_needs_no_file_that_a_conversion_does_not_read(offline_run: LaterRun) -> None:
    assert offline_run[0]["whole"]["download_bytes"] == 0


@pytest.mark.parametrize("repository", ["org/unknown", "org/partial", "org/tiny"])
def test_offline_mode_refuses_what_the_cache_does_not_hold(offline_run: LaterRun, repository: str) -> None:
    answer = offline_run[0][repository]
    assert answer["refused"] == "SourceError"
    assert f"there is no folder {repository}; offline mode is on" in answer["message"]
    assert f"(HF_HUB_OFFLINE) and {repository} is not complete in the local cache" in answer["message"]
    assert f"hf download {repository}" in answer["hint"]


def test_offline_mode_names_the_shards_that_the_cache_lacks(offline_run: LaterRun) -> None:
    answer = offline_run[0]["org/planned"]
    assert answer["message"] == f"org/planned lacks 2 of 2 shards that its index lists: {', '.join(SHARDS)}."
    assert answer["hint"] == "offline mode is on: unset HF_HUB_OFFLINE, or run 'hf download org/planned' first"


@pytest.mark.parametrize("name", REVISIONS)
def test_a_revision_is_resolved_from(name: str, hub: Hub, first_run: Answers) -> None:
    ref, _, experts_per_token = REVISIONS[name]
    assert first_run[name]["commit"] == hub.repositories["models", "org/versions"].refs[ref]
    assert first_run[name]["experts_per_token"] == experts_per_token


def test_a_revision_is_resolved_from_a_commit(hub: Hub, first_run: Answers) -> None:
    assert first_run["a commit"]["commit"] == hub.repositories["models", "org/versions"].refs["dev"]
    assert first_run["a commit"]["experts_per_token"] == 1


def test_a_former_name_leads_to_the_present_one(hub: Hub, first_run: Answers) -> None:
    assert first_run["former"]["commit"] == hub.model("org/named").refs["main"]
    assert first_run["former"]["warnings"][0] == "org/former has been renamed to org/named."
    assert file_requests(hub.requests, "org/former") == []


def test_a_source_knows_whether_it_is_gated(first_run: Answers, offline_run: LaterRun) -> None:
    assert (first_run["gated"]["gated"], first_run["planned"]["gated"]) == (True, False)
    assert offline_run[0]["whole"]["gated"] is None


@pytest.mark.parametrize("name", ["private", "gated"])
def test_a_token_opens_a_closed_repository(first_run: Answers, name: str) -> None:
    assert first_run[name]["download_bytes"] == SHARD_BYTES


def test_a_stored_login_opens_a_private_repository(second_run: LaterRun) -> None:
    assert second_run[0]["private"]["download_bytes"] == SHARD_BYTES


@pytest.mark.parametrize("name", REFUSALS)
def test_planning_refuses(name: str, first_run: Answers) -> None:
    _, message, hint = REFUSALS[name]
    answer = first_run[name]
    assert answer["refused"] == "SourceError"
    assert message in answer["message"]
    assert hint in answer["hint"]


def test_every_kind_of_refusal_has_its_own_message(first_run: Answers) -> None:
    messages = {first_run[name]["message"].replace(call["source"], "") for name, (call, _, _) in REFUSALS.items()}
    # The Hub itself does not distinguish a private repository from an unknown one.
    assert len(messages) == len(REFUSALS) - 2


def test_an_endpoint_that_does_not_answer_is_refused(machine: Machine) -> None:
    with socket.socket() as closed:
        # Bound, so that the port stays free, but not listening.
        closed.bind(("127.0.0.1", 0))
        answers = machine.run(f"http://127.0.0.1:{closed.getsockname()[1]}", {"plan": plan("org/elsewhere")})
    assert answers["plan"]["refused"] == "SourceError"
    assert "there is no folder org/elsewhere; the Hub cannot be reached for org/elsewhere" in answers["plan"]["message"]
    assert answers["plan"]["hint"] == "check the network, or HF_ENDPOINT"


@pytest.mark.parametrize(
    ("variable", "value", "message", "hint"),
    [
        ("SSL_CERT_FILE", "/nonexistent.pem", "SSL_CERT_FILE is /nonexistent.pem, which cannot be used", "unset it"),
        ("SSL_CERT_FILE", __file__, f"SSL_CERT_FILE is {__file__}, which cannot be used", "file of certificates"),
        ("HTTPS_PROXY", "strange://me:secret@host", "the proxy of HTTPS_PROXY cannot be used", "correct the variable"),
        ("ALL_PROXY", "http://host:port", "the proxy of ALL_PROXY cannot be used", "correct the variable"),
    ],
)
def test_a_setting_with_which_no_request_can_be_made_is_named(
    hub: Hub, machine: Machine, variable: str, value: str, message: str, hint: str
) -> None:
    answer = machine.run(hub.url, {"plan": plan("org/tiny")}, **{variable: value})["plan"]
    assert (answer["refused"], message in answer["message"], hint in answer["hint"]) == ("SourceError", True, True)
    assert "secret" not in answer["message"]


@pytest.mark.skipif(find_spec("socksio") is not None, reason="SOCKS proxies work here")
def test_a_proxy_that_needs_another_package_is_refused_with_its_name(hub: Hub, machine: Machine) -> None:
    answer = machine.run(hub.url, {"plan": plan("org/tiny")}, ALL_PROXY="socks5://127.0.0.1:9")["plan"]
    assert "the proxy of ALL_PROXY cannot be used" in answer["message"]
    assert "pip install socksio" in answer["hint"]
