"""A user's machine that talks to a Hub, and the calls that are made on it.

The client reads its endpoint, its cache and its offline switch when it is imported, so the code under test runs in
processes of its own. Each process takes a list of calls and answers with what they returned, or with the refusal.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from places import TESTS

OPENER, STRANGER, EXPIRED, BROKEN = "hf_opens_everything", "hf_opens_nothing", "hf_expired", "hf_two\nlines"
WRITER, READER, OTHER_WRITER, FINE_GRAINED = "hf_writes", "hf_reads_only", "hf_writes_elsewhere", "hf_writes_one"
SECRETS = (OPENER, STRANGER, EXPIRED, "hf_two", WRITER, READER, OTHER_WRITER, FINE_GRAINED)

CLIENT = """
import json
import sys
from pathlib import Path

from huggingface_hub import snapshot_download

from hcsmoe_hub import CalibrationOptions, ConvertOptions, HcsmoeError, convert
from hcsmoe_hub import plan as plan_conversion
from hcsmoe_hub.hub import retry
from hcsmoe_hub.hub.open import open_source
from hcsmoe_hub.planning.estimate import estimate_needs


# Only our own pauses can be shortened; the client's are a second and more.
retry.PAUSES_SECONDS = (0.05,) * 4


def answer(action, source, output="unused", token_ids="bundled", low_disk=False, like=None, **where):
    if action == "download":
        return snapshot_download(source, **where)
    if action == "open":
        return {name: [tensor.shard, tensor.offset] for name, tensor in open_source(source, **where).tensors.items()}
    if action == "files":
        return open_source(source, **where).files()
    if "cache_dir" in where:
        where["cache_dir"] = Path(where["cache_dir"])
    calibration = CalibrationOptions(dataset=token_ids)
    count = {"experts": 4} if like is None else {"like": like}
    options = ConvertOptions(**count, output=Path(output), calibration=calibration, low_disk=low_disk)
    if action == "alike":
        return convert(source, options, **where).as_dict()["like"]
    if action == "convert":
        return convert(source, options, **where).as_dict()["source"]
    plan = plan_conversion(source, options, **where)
    return {
        "commit": plan.model.source.revision,
        "experts_per_token": plan.settings.experts_per_token,
        "download_bytes": estimate_needs(plan).download_bytes,
        "cache_bytes": estimate_needs(plan).cache_bytes,
        "gated": plan.model.source.gated,
        "warnings": plan.warnings,
    }


answers = {}
for name, call in json.load(sys.stdin).items():
    try:
        answers[name] = answer(**call)
    except HcsmoeError as error:
        answers[name] = {"refused": type(error).__name__, "message": error.message, "hint": error.hint}
json.dump(answers, sys.stdout)
"""

Call = Mapping[str, Any]
# The other program: calls of it run side by side, or after each other where they are listed.
PUSHER = TESTS / "hub" / "pusher.py"
Answers = Mapping[str, Any]


def plan(source: str, **where: Any) -> Call:
    return {"action": "plan", "source": source, **where}


@dataclass(frozen=True, slots=True)
class Machine:
    """A user's machine: a home with a cache, a folder for results, and calibration tokens."""

    folder: Path

    def convert(self, source: str, result: str) -> Call:
        files = {"output": str(self.folder / result), "token_ids": str(self.folder / "ids.npy")}
        return {"action": "convert", "source": source, **files}

    def environment(self, endpoint: str, **more: str) -> dict[str, str]:
        """Variables of a process on this machine; nothing of the tests' own settings reaches it."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        hub = {"HF_ENDPOINT": endpoint, "HF_HOME": str(self.folder / "home")}
        direct = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        switches = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return {**inherited, **hub, **direct, **switches, **more}

    def run(
        self,
        endpoint: str,
        calls: Mapping[str, Call | Sequence[Call]],
        program: Sequence[str | Path] = ("-c", CLIENT),
        **environment: str,
    ) -> Answers:
        """Runs calls in a new process; no output of it may show a token."""
        process = subprocess.run(
            [sys.executable, *program],
            input=json.dumps(calls),
            env=self.environment(endpoint, **environment),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert process.returncode == 0, process.stderr
        assert [secret for secret in SECRETS if secret in process.stdout + process.stderr] == []
        answers: Answers = json.loads(process.stdout)
        return answers

    def weights(self, result: str) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in (self.folder / result).glob("*.safetensors")}
