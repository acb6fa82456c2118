"""Seconds by part of a conversion, with the device waited for at both ends of what runs in the main thread."""

import threading
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Self

from gpu_run import Run

from hcsmoe_hub.checkpoint.reader import TensorReader
from hcsmoe_hub.layer.reducer import LayerReducer
from hcsmoe_hub.model.layer_loader import LayerLoader
from hcsmoe_hub.observation.watcher import BlockWatcher
from hcsmoe_hub.pipeline.result_writer import ResultWriter
from hcsmoe_hub.pipeline.stream import StreamedLayer

READ, LOAD, FORWARD, WRITE = "read from disk", "load a layer, reading included", "forward", "write the result"
# What is timed, and what it is called; some parts lie within others.
PARTS: tuple[tuple[type, str, str], ...] = (
    (TensorReader, "read", READ),
    (LayerLoader, "load", LOAD),
    (LayerLoader, "take", "wait for a layer"),
    (StreamedLayer, "run", FORWARD),
    (BlockWatcher, "observation", "finish statistics"),
    (ResultWriter, "write", WRITE),
    (LayerReducer, "reduce", "reduce, all of it"),
    (LayerReducer, "_sample", "reduce: sample"),
    (LayerReducer, "_energies", "reduce: energies"),
    (LayerReducer, "_select", "reduce: compare and select"),
    (LayerReducer, "_merge", "reduce: merge"),
    (LayerReducer, "_lay_out", "reduce: router rows and layout"),
    (LayerReducer, "_fit_router", "reduce: fit the router"),
    (LayerReducer, "_refit", "reduce: refit"),
    (LayerReducer, "_compare", "reduce: compare with the source"),
)


class Stopwatch:
    """Adds up the time of parts while it is open.

    Args:
        run: Says which device is waited for.

    Attributes:
        seconds: By part.
        calls: By part.
    """

    def __init__(self, run: Run) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self._run = run
        self._originals: list[tuple[type, str, Any]] = []

    def _timed(self, function: Callable[..., Any], label: str) -> Callable[..., Any]:
        def timed(*arguments: Any, **keywords: Any) -> Any:
            # A background thread works next to the device, not with it.
            waits = threading.current_thread() is threading.main_thread()
            if waits:
                self._run.wait()
            begin = time.perf_counter()
            try:
                return function(*arguments, **keywords)
            finally:
                if waits:
                    self._run.wait()
                self.seconds[label] += time.perf_counter() - begin
                self.calls[label] += 1

        return timed

    def __enter__(self) -> Self:
        for owner, name, label in PARTS:
            original = owner.__dict__[name]
            is_static = isinstance(original, staticmethod)
            timed = self._timed(original.__func__ if is_static else original, label)
            setattr(owner, name, staticmethod(timed) if is_static else timed)
            self._originals.append((owner, name, original))
        return self

    def __exit__(self, *_: object) -> None:
        for owner, name, original in reversed(self._originals):
            setattr(owner, name, original)
