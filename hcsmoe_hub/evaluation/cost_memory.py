"""What is measured of one model in a fresh process, so that two models and earlier work do not add up."""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from hcsmoe_hub.evaluation import cost_process
from hcsmoe_hub.evaluation.checkpoint import Checkpoint
from hcsmoe_hub.evaluation.cost_options import CostOptions
from hcsmoe_hub.events import Listener, Warned


@dataclass(frozen=True, slots=True, kw_only=True)
class Fresh:
    """How a fresh process opens and runs a model.

    Attributes:
        options: Sizes and repetitions.
        device: Where it runs.
        dtype: Dtype of its weights.
        token: Hub token; ``None`` uses the stored login.
        cache_dir: Hub cache; ``None`` uses the default one.
        emit: Called with what a process that failed said last.
    """

    options: CostOptions
    device: torch.device
    dtype: torch.dtype
    token: str | None
    cache_dir: Path | None
    emit: Listener

    def peak(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Peak memory: ``{"peak": as cost_process.peaks returns it}``, or ``{"problem": why there is none}``."""
        return self._ask(checkpoint, "peak")

    def throughput(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Throughput in vLLM: ``{"throughput": by batch size}``, or ``{"problem": why there is none}``."""
        return self._ask(checkpoint, "throughput")

    def _ask(self, checkpoint: Checkpoint, wanted: str) -> dict[str, Any]:
        source = checkpoint.source
        request = {
            "wanted": wanted,
            "location": source.label if source.path is None else str(source.path),
            "revision": source.revision,
            "options": asdict(self.options),
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "vocab_size": checkpoint.vocab_size,
            "token": self.token,
            "cache_dir": None if self.cache_dir is None else str(self.cache_dir),
        }
        # -P: files in the current folder must not shadow libraries.
        command = [sys.executable, "-P", "-m", cost_process.__name__]
        done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)
        if done.returncode:
            # Said here and not recorded: it may name folders of this machine.
            for line in done.stderr.strip().splitlines()[-1:]:
                self.emit(Warned(f"the process that ran {checkpoint.source.label} failed: {line}"))
            return {"problem": f"the process that ran the model ended with exit code {done.returncode}"}
        found: dict[str, Any] = json.loads(done.stdout)
        return found
