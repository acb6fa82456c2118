"""Faults of the cache, of the connection and of the Hub's content while weights are read: one message each."""

import errno
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx2
import pytest
from hub_client import Answers, Machine
from hub_server import Fault, Hub
from huggingface_hub import errors
from places import EXAMPLE, ROOT, TESTS

from hcsmoe_hub.checkpoint.source import LocalSource
from hcsmoe_hub.errors import SourceError
from hcsmoe_hub.hub.errors import ForeignAnswer, XetError
from hcsmoe_hub.hub.read_errors import translate_read_errors
from hcsmoe_hub.hub.write_errors import PushError, translate_write_errors
from hub.reader import read_all

READER = TESTS / "hub" / "reader.py"
SHARDS = tuple(sorted(path.name for path in EXAMPLE.glob("*.safetensors")))
CERTIFICATE = "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed certificate (_ssl.c:1006)"


def unreachable() -> errors.LocalEntryNotFoundError:
    """What the client raises for a file if no connection is made, and the cache does not hold it."""
    error = errors.LocalEntryNotFoundError("An error happened while trying to locate the file on the Hub")
    error.__cause__ = httpx2.ConnectError(CERTIFICATE)
    return error


FAULTS: Mapping[str, tuple[Exception, str, str]] = {
    "no permission": (PermissionError(errno.EACCES, "Permission denied", "/c/x"), "cannot be written to", "cache_dir"),
    "read-only disk": (OSError(errno.EROFS, "Read-only file system"), "cannot be written to", "cache_dir"),
    "quota": (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk is full", "free some space"),
    "full disk": (OSError(errno.ENOSPC, "No space left on device"), "the disk is full", "free some space"),
    "full disk, Xet": (XetError("Task error: No space left (os error 28)"), "the disk is full", "free some space"),
    "no locks": (OSError(errno.ENOLCK, "No locks available"), "does not offer locks", "on a local disk"),
    "stale handle": (OSError(errno.ESTALE, "Stale file handle"), "has lost a file", "mount the folder again"),
    "cleaned": (FileNotFoundError(errno.ENOENT, "No such file", "/c/x"), "was deleted while", "clean the cache"),
    "certificate": (unreachable(), "CERTIFICATE_VERIFY_FAILED", "point SSL_CERT_FILE"),
    "proxy": (ForeignAnswer("it is a page (text/html), not a file"), "is not from the Hub", "check the proxy"),
    "xet": (XetError("Task error: 403 Forbidden, domain: http://x/y?signature=1"), "over Xet", "HF_HUB_DISABLE_XET=1"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_has_its_own_message(name: str, tmp_path: Path) -> None:
    error, message, hint = FAULTS[name]
    with pytest.raises(SourceError) as raised, translate_read_errors("org/name", "main", cache=tmp_path):
        raise error
    assert message in raised.value.message
    assert hint in raised.value.hint
    assert "\n" not in raised.value.message + raised.value.hint
    assert "signature" not in raised.value.message


def test_a_certificate_that_is_not_trusted_is_named_when_pushing() -> None:
    with pytest.raises(PushError, match="CERTIFICATE_VERIFY_FAILED") as raised, translate_write_errors("org/x", "main"):
        raise httpx2.ConnectError(CERTIFICATE)
    assert "point SSL_CERT_FILE" in raised.value.hint


def test_no_duration_is_measured_with_the_clock_of_the_day() -> None:
    files = [path for name in ("hcsmoe_hub", "cli", "model_cards") for path in (ROOT / name).rglob("*.py")]
    assert [path.name for path in files if "time.time()" in path.read_text("utf-8")] == []


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return Machine(tmp_path_factory.mktemp("machine"))


@pytest.fixture(scope="module")
def hub(machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    later = tmp_path_factory.mktemp("later")
    for path in EXAMPLE.iterdir():
        shutil.copy(path, later)
    content = bytearray((later / SHARDS[1]).read_bytes())
    content[-1] ^= 1
    (later / SHARDS[1]).write_bytes(content)
    lock = threading.Lock()
    with Hub() as server:
        names = ("file", "page", "moved", "moved-low", "wrong", "cleaned", "closed")
        for name in names:
            server.add(f"org/{name}", EXAMPLE)
        server.pages.add(f"/org/page/resolve/{server.model('org/page').refs['main']}/{SHARDS[0]}")

        def faults(method: str, path: str) -> Fault | None:
            # The branch moves when the first shard is requested.
            for name in ("moved", "moved-low"):
                if path.startswith(f"/org/{name}/") and path.endswith(".safetensors"):
                    with lock:
                        if len(server.model(f"org/{name}").commits) == 1:
                            server.model(f"org/{name}").commit(later, ref="main")
            return None

        server.faults = faults
        # What the Hub names as the hash of this shard is not that of its content.
        files = server.model("org/wrong").at("main").files
        assert isinstance(files, dict)
        damaged = tmp_path_factory.mktemp("damaged") / SHARDS[1]
        damaged.write_bytes(content)
        files[SHARDS[1]] = type(files[SHARDS[1]])(damaged, len(content), files[SHARDS[1]].oid, files[SHARDS[1]].sha256)
        yield server


@pytest.fixture(scope="module")
def answers(hub: Hub, machine: Machine) -> Answers:
    (machine.folder / "file").touch()
    calls = {
        "file": {"source": "org/file", "cache_dir": str(machine.folder / "file")},
        "page": {"source": "org/page"},
        "moved": {"source": "org/moved"},
        "moved-low": {"source": "org/moved-low", "low_disk": True},
        "wrong": {"source": "org/wrong", "low_disk": True},
        "cleaned": {"source": "org/cleaned", "cleaned": True},
    }
    if os.getuid():
        closed = machine.folder / "closed"
        closed.mkdir(mode=0o555)
        calls["closed"] = {"source": "org/closed", "cache_dir": str(closed)}
    return machine.run(hub.url, calls, (READER,))


@pytest.fixture(scope="module")
def expected() -> object:
    return read_all(LocalSource(EXAMPLE))["digest"]


def test_a_cache_that_is_a_file_is_refused(answers: Answers, machine: Machine) -> None:
    assert answers["file"]["message"] == f"the Hub cache {machine.folder / 'file'} is a file."


@pytest.mark.skipif(os.getuid() == 0, reason="the superuser may write everywhere")
def test_a_cache_that_cannot_be_written_to_is_refused(answers: Answers, machine: Machine) -> None:
    assert f"the Hub cache {machine.folder / 'closed'} cannot be written to" in answers["closed"]["message"]


def test_a_page_in_place_of_a_shard_is_refused(answers: Answers) -> None:
    assert "is not from the Hub: it is a page (text/html" in answers["page"]["message"]
    assert answers["page"]["hint"] == "check the proxy, or HF_ENDPOINT"


@pytest.mark.parametrize("name", ["moved", "moved-low"])
def test_a_branch_that_moves_does_not_matter(name: str, hub: Hub, answers: Answers, expected: object) -> None:
    assert len(hub.model(f"org/{name}").commits) == 2
    assert answers[name]["digest"] == expected


def test_what_does_not_have_the_hash_of_the_hub_is_refused(answers: Answers, machine: Machine) -> None:
    assert f"of {SHARDS[1]} of org/wrong does not have the hash" in answers["wrong"]["message"]
    assert answers["wrong"]["hint"] == "add `restart=True` to begin anew"
    left = (machine.folder / "home" / "hub" / "models--org--wrong" / "hcsmoe").rglob(f"{SHARDS[1]}*")
    assert list(left) == []


def test_a_cache_that_is_cleaned_meanwhile_is_filled_again(answers: Answers, expected: object) -> None:
    assert answers["cleaned"]["digest"] == expected
