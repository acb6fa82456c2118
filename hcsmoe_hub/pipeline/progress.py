"""What a conversion has done so far, kept next to its unfinished result, so that the same command goes on from there.

After each decoder layer, what left the layer and what a report says about it are written to files of their own; then a
line in the journal marks the layer as done. A run that goes on reads them, and neither reads nor runs those layers.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from hcsmoe_hub.checkpoint.durable import write_json
from hcsmoe_hub.checkpoint.journal import Journal
from hcsmoe_hub.checkpoint.state_file import State, read_state, write_state
from hcsmoe_hub.checkpoint.unfinished import IDENTITY, identity_in, is_complete
from hcsmoe_hub.checkpoint.unfinished import progress as progress_folder
from hcsmoe_hub.errors import OutputError
from hcsmoe_hub.events import EventLog, Warned
from hcsmoe_hub.machine import ranks
from hcsmoe_hub.machine.device import resolve_device
from hcsmoe_hub.machine.transfer import Download
from hcsmoe_hub.pipeline.identity import STATISTICS, check_identity, identity
from hcsmoe_hub.pipeline.packing import CannotBeStoredError, Packer, unpack
from hcsmoe_hub.planning.conversion_plan import ConversionPlan
from hcsmoe_hub.result.claim import Claim
from hcsmoe_hub.result.commit import identity_of_complete

JOURNAL = "journal.jsonl"
# The step that has read the calibration set.
TEXT = "calibration"
# The step that has sent and deleted a shard, which its line names.
SENT = "sent"
# The step that has completed the statistics which a plan depends on.
OBSERVED = "observed"
# The step that has written a statistics file, whose content its line identifies.
WRITTEN = "statistics"


class Progress:
    """The journal of a conversion and the files that it speaks of.

    Args:
        folder: Folder of both; ``None`` where nothing is kept.
        log: Warnings and times, which are kept with every step.
        device: Where layers run.
        on_step: Called when there is something to go on from.

    Attributes:
        folder: The same.
        is_kept: Whether steps are kept; not any more once a model has shown that it cannot be continued.
    """

    def __init__(
        self,
        folder: Path | None,
        log: EventLog,
        device: torch.device,
        on_step: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder = folder
        self._on_step = on_step
        self.is_kept = folder is not None
        self.download = Download(device)
        self._log = log
        self._journal = None if folder is None else Journal(folder / JOURNAL)
        lines = self.lines()
        if lines:
            self.restore_log(lines[-1])

    def lines(self, step: str | None = None) -> list[dict[str, Any]]:
        """Lines of the journal, of one kind of step or of all; the same on every rank."""
        found = [] if self._journal is None else self._journal.lines
        # Folders on a network show what others have written late.
        return ranks.from_first([line for line in found if step is None or line["step"] == step])

    def sent(self) -> frozenset[str]:
        """Names of the shards that were sent away and deleted."""
        return frozenset(line["shard"] for line in self.lines(SENT))

    def append(self, step: str, **content: Any) -> None:
        """Adds a line to the journal, if one is kept; only the first rank does so."""
        if self._journal is not None and ranks.is_first():
            self._journal.append({"step": step, **content, **self._log.kept()})
            # Text alone is not worth a folder that stays behind when its conversion fails.
            if step != TEXT:
                self._on_step()

    def restore_log(self, line: Mapping[str, Any]) -> None:
        """Takes over the warnings and times that there were at some step."""
        self._log.restore(line["warnings"], line["seconds"])

    def give_up(self, why: str) -> None:
        """Stops keeping steps, and says so."""
        self.is_kept = False
        self._log.emit(Warned(f"an interrupted conversion of this model cannot be continued: {why}."))

    def path(self, name: str) -> Path:
        """A file or folder for what belongs to steps."""
        assert self.folder is not None, "there are files only where steps are kept"
        return self.folder / name

    def pack(self, value: Any) -> "Packed":
        """Takes a value apart, to be written by ``Packed.write``; see ``Packer.pack``."""
        packer = Packer()
        content = packer.pack(value)
        leaving = {name: self.download.mark(tensor) for name, tensor in packer.tensors.items()}
        versions = {name: tensor._version for name, tensor in packer.tensors.items()}
        return Packed(content, leaving, versions, self.download)

    def read(self, name: str, sha256: str) -> Any:
        """What was kept in a file; ``None`` if it is lost, or not what was written."""
        found: State | None = read_state(self.path(name), sha256)
        return None if found is None else unpack(found.content, found.tensors)

    def once(self, step: str, make: Callable[[], Any]) -> Any:
        """What a step makes: from its file if an earlier run has done it; on every rank what the first one has.

        Args:
            step: Its name.
            make: Does it; returns something that ``Packer.pack`` takes.
        """
        return ranks.first(lambda: self._once(step, make))

    def _once(self, step: str, make: Callable[[], Any]) -> Any:
        for line in reversed([line for line in self.own_lines() if line["step"] == step]):
            found = self.read(step, line["sha256"])
            if found is not None:
                return found
        made = make()
        if self.is_kept:
            try:
                packed = self.pack(made)
            except CannotBeStoredError as error:
                self.give_up(f"what is kept of the {step} holds {error}")
                return made
            self.append(step, sha256=packed.write(self.path(step)))
        return made

    def own_lines(self) -> list[dict[str, Any]]:
        """Lines of the journal as this rank knows it."""
        return [] if self._journal is None else self._journal.lines


class Packed:
    """A value that was taken apart, on its way to a file."""

    def __init__(
        self, content: Any, tensors: Mapping[str, Any], versions: Mapping[str, int], download: Download
    ) -> None:
        self._content = content
        self._tensors = tensors
        self._versions = versions
        self._download = download

    def write(self, path: Path) -> str:
        """Writes the file, from any thread; returns the digest that ``Progress.read`` takes."""
        return write_state(path, self._content, self._tensors, self._download)

    @property
    def is_changed(self) -> bool:
        """Whether a tensor has changed since the value was taken apart, so that the file may hold anything."""
        return any(leaving.values._version != self._versions[name] for name, leaving in self._tensors.items())


def open_progress(plan: ConversionPlan, claim: Claim, log: EventLog) -> Progress:
    """Finds out what an interrupted conversion has done, or begins anew where there is none.

    Args:
        plan: The conversion.
        claim: Its output folder.
        log: Warnings and times.

    Raises:
        PlanError: If an interrupted conversion was another one.
    """
    device = resolve_device(plan.options.device)
    ranks.on_first(lambda: _prepare(plan, claim))
    if not plan.options.checkpoint:
        return Progress(None, log, device)

    def keep() -> None:
        claim.goes_on = True

    return Progress(progress_folder(plan.output), log, device, on_step=keep)


def _prepare(plan: ConversionPlan, claim: Claim) -> None:
    """Leaves in the output folder what this conversion goes on from."""
    options, path = plan.options, progress_folder(plan.output) / IDENTITY
    now = identity(plan)
    if is_complete(plan.output) and not options.restart:
        _finish(plan, claim, now)
        if claim.is_committed:
            return
    before = None if options.restart or not options.checkpoint else identity_in(plan.output)
    lines = Journal(path.with_name(JOURNAL)).lines
    if before is None or not lines:
        claim.begin_anew()
        # Even where nothing else is kept: a move that is cut short is finished by the same options.
        write_json(path, now)
        return
    written = {line["digest"] for line in lines if line["step"] == WRITTEN}
    if now[STATISTICS] in written:
        # The interrupted conversion itself has written the file.
        now[STATISTICS] = before.get(STATISTICS)
    check_identity(before, now, plan.output)
    claim.goes_on = True


def _finish(plan: ConversionPlan, claim: Claim, now: Mapping[str, Any]) -> None:
    """Finishes the move of a complete result; unless it is the wanted one, it counts as an older one from then on.

    Raises:
        OutputError: If it must not be overwritten.
    """
    before = identity_of_complete(plan.output)
    claim.finish()
    # The interrupted conversion itself may have written the file.
    if before is not None and {**before, STATISTICS: None} == {**now, STATISTICS: None}:
        return
    if not plan.options.overwrite:
        raise OutputError(
            f"{plan.output} holds a complete result: an earlier run was interrupted while it moved the files, which is "
            "done now, or while it pushed them.",
            hint="use it, choose another folder with `output`, or add `overwrite=True`",
        )
    claim.release()
