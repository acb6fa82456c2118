"""From Hub to Hub: one command that converts a repository and pushes the result."""

import json
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from hub_client import SECRETS, WRITER, Machine
from hub_server import Account, Hub
from tiny_models import build, token_ids

from hcsmoe_hub.checkpoint.tensors import FIRST_READ_BYTES
from hcsmoe_hub.checkpoint.unfinished import progress
from hub.folders import files_under

CONVERTER = Path(__file__).with_name("converter.py")
SOURCE = "org/model"
# Shards large enough that reading a header is not reading the shard, and that a layer is in several of them.
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
SOURCE_SHARD, SHARD_BYTES = "500KB", 300_000
HEADER_RANGE = f"bytes=0-{FIRST_READ_BYTES - 1}"
# What ``st_blocks`` counts.
BLOCK_BYTES = 512
PUT = re.compile(r"/_lfs/models/(?P<repo>[^/]+/[^/]+)/(?P<oid>[0-9a-f]{64})/")
# What differs between two conversions that do the same: times, and the name of a folder or repository.
OF_A_RUN = ("hcsmoe.json", "README.md", ".gitattributes")


@dataclass(frozen=True, slots=True)
class Journey:
    """A user's machine, a Hub with a model on it, and the command that leads from one repository to the next."""

    machine: Machine
    hub: Hub

    @classmethod
    def prepare(cls, folder: Path, hub: Hub) -> Self:
        """Puts a sharded model on the Hub, and calibration tokens on the machine."""
        hub.add(SOURCE, build(folder / "model", max_shard_size=SOURCE_SHARD, **SIZES))
        home = folder / "machine"
        home.mkdir()
        np.save(home / "ids.npy", token_ids().numpy())
        return cls(Machine(home), hub)

    def command(self, target: str | None, *more: str) -> list[str]:
        """The command line, for a process that runs in the machine's folder."""
        words = [sys.executable, str(CONVERTER), "convert", SOURCE, "--experts", "4", "--preset", "hc-smoe"]
        words += ["--calibration", "ids.npy", "--max-shard-size", f"{SHARD_BYTES // 1000}KB", *more]
        return words if target is None else [*words, "--push-to", target]

    def start(self, target: str | None, *more: str, **environment: str) -> "subprocess.Popen[str]":
        """Starts a conversion."""
        return subprocess.Popen(
            self.command(target, *more),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self.machine.environment(self.hub.url, HF_TOKEN=WRITER, **environment),
            cwd=self.machine.folder,
            text=True,
        )

    def run(self, target: str | None, *more: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        """Makes a conversion; no output of it may show a token."""
        process = self.start(target, *more, **environment)
        out, errors = process.communicate()
        assert [secret for secret in SECRETS if secret in out + errors] == []
        return subprocess.CompletedProcess(process.args, process.returncode, out, errors)

    def visible(self, repo_id: str) -> dict[str, bytes]:
        """The visible files of a repository, without those that differ from run to run."""
        if ("models", repo_id) not in self.hub.repositories:
            return {}
        contents = self.hub.model(repo_id).contents()
        return {name: content for name, content in contents.items() if name not in OF_A_RUN}

    def kept(self, step: str) -> list[Mapping[str, Any]]:
        """Lines of the journal of an interrupted conversion, of one kind of step."""
        path = progress(self.machine.folder / "model-hcsmoe-4e") / "journal.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in map(json.loads, lines) if line["step"] == step]

    def arrivals(self) -> Counter[tuple[str, str]]:
        """How often each large file arrived as a whole, by repository and content."""
        bodies = [each for each in self.hub.requests if each.method == "PUT" and each.status == 200]
        matches = [PUT.match(each.path) for each in bodies if each.received == each.length]
        return Counter((match["repo"], match["oid"]) for match in matches if match)

    def downloaded(self) -> Counter[str]:
        """Bytes sent of every shard of the source, without headers."""
        sent: Counter[str] = Counter()
        for each in self.hub.requests:
            is_shard = each.path.startswith(f"/{SOURCE}/") and each.path.endswith(".safetensors")
            if each.method == "GET" and is_shard and each.range != HEADER_RANGE:
                sent[Path(each.path).name] += each.sent
        return sent

    def shards(self) -> dict[str, bytes]:
        """The shards of the source."""
        contents = self.hub.model(SOURCE).contents()
        return {name: content for name, content in contents.items() if name.endswith(".safetensors")}


@contextmanager
def measuring_disk(folder: Path) -> Iterator[list[int]]:
    """Polls how much disk a folder takes; the list holds the maximum."""
    most, stop = [0], threading.Event()

    def look() -> None:
        while not stop.is_set():
            total = 0
            for path in files_under(folder):
                with suppress(FileNotFoundError):
                    total += path.lstat().st_blocks * BLOCK_BYTES
            most[0] = max(most[0], total)
            stop.wait(0.002)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield most
    finally:
        stop.set()
        thread.join()


def make_hub() -> Hub:
    """A Hub on which the machine's user may write."""
    return Hub(tokens={WRITER: Account(name="me", role="write")})
