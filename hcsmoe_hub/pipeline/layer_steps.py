"""The decoder layers of one pass: those that an earlier run has done, and those that this run does."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from hcsmoe_hub.events import Stage, StageResumed
from hcsmoe_hub.machine import ranks
from hcsmoe_hub.model.skeleton import Skeleton
from hcsmoe_hub.observation.statistics_writer import Mark, StatisticsWriter
from hcsmoe_hub.pipeline.given_tensors import GivenTensors
from hcsmoe_hub.pipeline.looking_back import WHY, looks_back
from hcsmoe_hub.pipeline.packing import CannotBeStoredError
from hcsmoe_hub.pipeline.progress import Packed, Progress

# Hidden states are kept of so many layers: a file that is lost costs one layer more.
KEPT_STATES = 2


class Saver(Protocol):
    """Saves what a layer leaves, after its tensors and usually on another thread."""

    def settle(self) -> None:
        """Waits until everything is saved."""
        ...

    def after(self, task: Callable[[], None]) -> None:
        """Runs a task when everything is written that was handed over before."""
        ...

    def sync(self) -> dict[str, str]:
        """Brings to the disk what was written; returns digests of new tensors by name. Called by tasks only."""
        ...


class AtOnce:
    """Saves what a layer leaves where a pass writes no tensors: right away."""

    def settle(self) -> None:
        """Everything is saved."""

    def after(self, task: Callable[[], None]) -> None:
        """Runs a task."""
        task()

    def sync(self) -> dict[str, str]:
        """An observing pass writes no tensors."""
        return {}


class LayerSteps:
    """Keeps what each layer of a pass leaves, and gives back what an earlier run has kept.

    Args:
        progress: Where it is kept.
        stage: The pass.
        saver: Saves it.

    Attributes:
        progress: The same.
        last: The last layer that is done; -1 if none is.
        states: What left the last layer that the model ran; ``None`` where no layer is done, or none was run.
        results: What was kept of every layer that is done, in order.
        digests: SHA-256 of the tensors that are written, by name.
        marks: What is complete of a statistics file that is written, in order.
        statistics: The file, if one is written.
    """

    def __init__(self, progress: Progress, stage: Stage, saver: Saver) -> None:
        self.states: Any = None
        self.digests: dict[str, str] = {}
        self.progress = progress
        self._stage = stage
        self._saver = saver
        self._carriers: list[int] = []
        self._pending: dict[str, Any] | None = None
        self._given = GivenTensors()
        self._is_checked = False
        lines = progress.lines(stage.value)
        self._lines = {line["layer"]: line for line in lines}
        self.results = self._read_results()
        self.last = self._find_last()
        self.results = self.results[: self.last + 1]
        self.marks: list[Mark] = []
        self.statistics: StatisticsWriter | None = None
        for line in (self._lines[layer] for layer in range(self.last + 1)):
            self.digests |= line["tensors"]
            self.marks += [] if line["statistics"] is None else [line["statistics"]]
        if self.last >= 0:
            progress.restore_log(self._lines[self.last])

    def goes_on(self) -> bool:
        """Whether a run that is interrupted now could be continued behind a layer of this pass."""
        return any(line["step"] == self._stage.value for line in self.progress.own_lines())

    def forget(self) -> None:
        """Begins with the first layer again, as something that layers have written is lost."""
        self.last, self.states, self.results = -1, None, []
        self.digests, self.marks, self._carriers = {}, [], []

    def _read_results(self) -> list[Any]:
        """What was kept of the first layers, up to one that is not done or whose file is lost."""
        results = list[Any]()
        while (line := self._lines.get(len(results))) is not None:
            found = self.progress.read(self._name(line["layer"]), line["results"])
            if found is None:
                break
            results.append(found)
        return results

    def _find_last(self) -> int:
        """The last layer that all ranks can go on from; reads what left it."""
        most = min(ranks.every(len(self.results) - 1))
        while True:
            found = ranks.every(self._find_states(most))
            most = min(found)
            if max(found) == most:
                return most

    def _find_states(self, most: int) -> int:
        """The last layer up to ``most`` that this rank can go on from."""
        self.states = None
        while most >= 0:
            carriers = [layer for layer in range(most + 1) if self._lines[layer]["states"] is not None]
            self._carriers = [layer for layer in carriers if None not in self._lines[layer]["states"]][-KEPT_STATES:]
            if not carriers:
                return most
            digest = self._lines[carriers[-1]]["states"][ranks.number()]
            if digest is not None:
                self.states = self.progress.read(self._states_name(carriers[-1]), digest)
            if self.states is not None:
                return most
            most = carriers[-1] - 1
        return most

    def announce(self, emit: Callable[[StageResumed], None]) -> None:
        """Reports where the pass goes on, if layers are done."""
        if self.last >= 0:
            emit(StageResumed(self._stage, self.last + 1))

    def begin(self, module: nn.Module, inputs: Any) -> None:
        """Notes that a layer is about to run. What left the one before is saved by then if this one may change it.

        Args:
            module: The layer.
            inputs: What it is given.
        """
        if self.progress.is_kept and self._given.may_change(module, inputs):
            self._saver.settle()

    def check(self, skeleton: Skeleton, layer: int, output: Any, token_ids: Tensor, source_length: int) -> None:
        """Stops keeping steps of a model that cannot be continued; looks at it once, when its first layer has run.

        Args:
            skeleton: The model.
            layer: Index of the layer. One of a head, which the decoder does not call, says nothing about the others.
            output: What the layer returned.
            token_ids: ``[B, S]`` int64, what the model runs on.
            source_length: Tokens of a sequence that an encoder reads; 0 without one.
        """
        if self.progress.is_kept and not self._is_checked and layer < skeleton.depth:
            self._is_checked = True
            if looks_back(skeleton, output, token_ids[:1], source_length):
                self.progress.give_up(WHY)

    def done(self, layer: int, *, results: Any, states: Any = None) -> None:
        """Notes that a layer is done; it is kept when everything that was handed to the writer before is written.

        Args:
            layer: Its number.
            results: What is known about it.
            states: What left it; ``None`` where the model did not run it.
        """
        progress = self.progress
        self._given.learn()
        if not progress.is_kept:
            return
        try:
            kept, left = progress.pack(results), None if states is None else progress.pack(states)
        except CannotBeStoredError as error:
            progress.give_up(f"layer {layer} returns {error}")
            return
        mark = None if self.statistics is None else self.statistics.mark()
        self._saver.after(lambda: self._save(layer, kept, left, mark))

    def _save(self, layer: int, results: Packed, states: Packed | None, mark: Mark | None) -> None:
        """Writes what a layer leaves; in a single process, the layer is done then."""
        line: dict[str, Any] = {"layer": layer, "tensors": self._saver.sync(), "statistics": mark, "states": None}
        if self.statistics is not None:
            self.statistics.sync()
        if states is not None:
            line["states"] = [self._write_states(layer, states)]
        if ranks.is_first():
            line["results"] = results.write(self.progress.path(self._name(layer)))
        self._pending = line
        if ranks.size() == 1:
            self._commit([line])

    def _write_states(self, layer: int, states: Packed) -> str | None:
        """Writes what left a layer; returns its digest, or ``None`` if it has changed meanwhile.

        A run that is interrupted then goes on behind the layer before.
        """
        path = self.progress.path(self._states_name(layer))
        digest = states.write(path)
        if not states.is_changed:
            return digest
        path.unlink()
        return None

    def confirm(self) -> None:
        """Notes that a layer is done which all ranks have saved: all call it when their writers have nothing to do."""
        if ranks.size() > 1 and self.progress.folder is not None:
            found = ranks.every(self._pending)
            if all(line is not None for line in found):
                ranks.on_first(lambda: self._commit([line for line in found if line is not None]))
                self._clean(found[0] or {})
            self._pending = None

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        """Adds a layer to the journal, from what each rank has saved of it."""
        line = dict(lines[0])
        line["tensors"] = {name: digest for each in lines for name, digest in each["tensors"].items()}
        if line["states"] is not None:
            line["states"] = [digest for each in lines for digest in each["states"]]
        self.progress.append(self._stage.value, **line)
        self._pending = None
        if ranks.size() == 1:
            self._clean(line)

    def _clean(self, line: Mapping[str, Any]) -> None:
        """Removes hidden states that nobody needs any more."""
        if line["states"] is None or None in line["states"]:
            return
        self._carriers.append(line["layer"])
        for layer in self._carriers[:-KEPT_STATES]:
            self.progress.path(self._states_name(layer)).unlink(missing_ok=True)
        self._carriers = self._carriers[-KEPT_STATES:]

    def _name(self, layer: int) -> str:
        return f"{self._stage.value}-{layer}.results"

    def _states_name(self, layer: int) -> str:
        return f"{self._stage.value}-{layer}.states-{ranks.number()}"
