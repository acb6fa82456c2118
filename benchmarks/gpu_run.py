"""One run of the checks on a GPU: its device, its budget of seconds, and what it has found, on disk at once."""

import gc
import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hcsmoe_hub.errors import HcsmoeError
from hcsmoe_hub.machine import accelerator

# What a part may fail with without ending the run. A lack of memory, a ``RuntimeError`` where torch reports it, is
# one of them: what the part held is released before the next one begins.
FAILURES = (HcsmoeError, ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, OSError)
FAILURES += (RuntimeError, TypeError, ValueError)


@dataclass(slots=True, kw_only=True, eq=False)
class Run:
    """What all parts share.

    Attributes:
        device: The device under test.
        is_tiny: Whether shapes are small: a dry run of the script itself.
        budget: Seconds for everything.
        out: Folder of the results.
        scratch: Folder for synthetic checkpoints.
        models: Folder with trained tiny models; ``None`` without one.
        found: All findings by part, as ``gpu_check.json`` holds them.
    """

    device: torch.device
    is_tiny: bool
    budget: float
    out: Path
    scratch: Path
    models: Path | None = None
    found: dict[str, Any] = field(default_factory=lambda: {"skipped": [], "failed": {}})
    _start: float = field(default_factory=time.perf_counter)

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.budget - self.elapsed

    def say(self, text: str) -> None:
        """Prints a line with the time."""
        print(f"[{self.elapsed:6.1f}s] {text}", flush=True)

    def keep(self, key: str, value: Any) -> None:
        """Adds a finding and writes all of them."""
        self.found[key] = value
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "gpu_check.json").write_text(json.dumps(self.found, indent=1, default=str) + "\n")

    def keep_row(self, table: str, name: str, row: Any) -> None:
        """Adds a row to a table of findings."""
        self.keep(table, {**self.found.get(table, {}), name: row})

    def wait(self) -> None:
        """Waits until the device has done all it was given."""
        if not accelerator.is_host(self.device):
            torch.get_device_module(self.device.type).synchronize(self.device)

    def part(self, name: str, seconds: float, work: Callable[[], None]) -> None:
        """Does a part if it fits into what is left of the budget; a failure is recorded and does not stop the rest.

        Args:
            name: Of the part.
            seconds: About what it takes on an H100.
            work: Does it.
        """
        if self.left < seconds and not self.is_tiny:
            self.keep("skipped", [*self.found["skipped"], name])
            self.say(f"SKIPPED {name}: takes about {seconds:.0f} s, {self.left:.0f} s are left")
            return
        begin = time.perf_counter()
        try:
            work()
        except FAILURES as error:
            self.keep("failed", {**self.found["failed"], name: traceback.format_exc()})
            self.say(
                f"FAILED  {name}: {type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}"
            )
            frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "hcsmoe_hub" in frame.filename]
            for frame in frames[-4:]:
                self.say(f"        at {frame.filename.rpartition('hcsmoe_hub')[2]}:{frame.lineno} {frame.line}")
        gc.collect()
        accelerator.release_unused(self.device)
        self.say(f"        {name} took {time.perf_counter() - begin:.1f} s")
