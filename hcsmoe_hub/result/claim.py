"""An output folder that one conversion or recovery writes to: what it makes there, and what stays if it ends early."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from hcsmoe_hub.checkpoint.durable import sync_folder, write_bytes
from hcsmoe_hub.checkpoint.owner import OWNER, OwnedError, owning
from hcsmoe_hub.checkpoint.unfinished import (
    EXPLANATION,
    UNFINISHED,
    Work,
    is_complete,
    is_occupied,
    progress,
    refuse_other_work,
    staging,
    work_in,
)
from hcsmoe_hub.errors import OutputError, VerificationError, note_kept
from hcsmoe_hub.machine.signals import signals_held
from hcsmoe_hub.planning.conversion_plan import ConversionPlan
from hcsmoe_hub.result.commit import commit_result, discard, finish_moves, old_files, remove_progress

_EXPLANATION = """This folder holds an unfinished {work} of hcsmoe, begun {started}. It is not a model.

To go on, run the same command again. To give the {work} up, delete this folder, {name}.
"""


@dataclass(slots=True)
class Claim:
    """An output folder that is locked by one conversion or recovery.

    Attributes:
        output: The folder.
        work: What has locked it.
        is_pushed: Whether the result is pushed once it is in its place.
        goes_on: Whether what was written so far is of use to the next run, so that a failure leaves it; set on every
            rank.
        is_committed: Whether the result is complete and in its place, whatever happens next.
    """

    output: Path
    work: Work = Work.CONVERSION
    is_pushed: bool = False
    goes_on: bool = False
    is_committed: bool = False

    def begin_anew(self) -> None:
        """Removes what an earlier run has left unfinished, and makes room for a new one."""
        discard(self.output)
        self.goes_on = False
        staging(self.output).mkdir()
        progress(self.output).mkdir()
        started = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        text = _EXPLANATION.format(work=self.work, started=started, name=UNFINISHED)
        write_bytes(self.output / UNFINISHED / EXPLANATION, text.encode())

    def commit(self) -> None:
        """Moves the complete result to its place; signals wait until that is done."""
        self._move(lambda output: commit_result(output, is_pushed=self.is_pushed))

    def finish(self) -> None:
        """Finishes the move of a complete result that was cut short; signals wait until that is done."""
        self._move(finish_moves)

    def release(self) -> None:
        """Takes a complete result in its place for an older one, which the next one replaces."""
        remove_progress(self.output)
        self.is_committed = False

    def _move(self, move: Callable[[Path], None]) -> None:
        with signals_held():
            try:
                move(self.output)
            except BaseException:
                # A result that is complete is never given up.
                self.goes_on = self.goes_on or is_complete(self.output)
                raise
            self.is_committed = True


@contextmanager
def noting_what_is_kept(claim: Claim, place: Callable[[], str]) -> Iterator[None]:
    """Lets an exception say that the same options go on, if the next run has something to go on from.

    Where the source is at fault, or the result, the next run would end in the same way: nothing of it is kept.

    Args:
        claim: The claimed folder; of other ranks than the first, a stand-in.
        place: Says where the conversion is.
    """
    try:
        yield
    except VerificationError:
        claim.goes_on = False
        raise
    except BaseException as error:
        if claim.goes_on and not claim.is_committed:
            note_kept(error, place())
        raise


def claim_output(plan: ConversionPlan) -> AbstractContextManager[Claim]:
    """Claims the output folder of a conversion; see ``claim_folder``."""
    options, is_pushed = plan.options, plan.options.push is not None and not plan.sends_away
    claim = Claim(plan.output, is_pushed=is_pushed)
    return claim_folder(claim, overwrite=options.overwrite, restart=options.restart)


@contextmanager
def claim_folder(claim: Claim, *, overwrite: bool, restart: bool) -> Iterator[Claim]:
    """Makes an output folder and locks it; afterwards, what is unfinished is removed unless the next run needs it.

    Args:
        claim: The folder, and what locks it.
        overwrite: Whether an older result in it may be replaced.
        restart: Whether unfinished work in it may be given up.

    Raises:
        OutputError: If it cannot be made, another process has locked it, it holds unfinished work of another kind, or
            it has new content since the plan.
    """
    output = claim.output
    created = [path for path in (output / UNFINISHED, output, *output.parents) if not path.exists()]
    was_occupied = is_occupied(output)
    with ExitStack() as stack:
        stack.callback(_remove_empty, [output / UNFINISHED, *created])
        try:
            _replace_old_lock(output)
            (output / UNFINISHED).mkdir(parents=True, exist_ok=True)
            for path in created:
                sync_folder(path.parent)
            stack.enter_context(owning(output / UNFINISHED))
        except OwnedError as error:
            raise _in_use(output, error) from None
        except OSError as error:
            raise OutputError(
                f"nothing can be written to {output}: {error.strerror}.", hint="choose another folder with `output`"
            ) from error
        if not restart:
            refuse_other_work(output, claim.work)
        if (was_occupied or is_occupied(output)) and not overwrite:
            raise OutputError(f"{output} is no longer empty.", hint="choose another folder with `output`")
        # Until it is begun anew, whatever goes wrong costs nothing of an earlier run.
        claim.goes_on = progress(output).exists() or is_complete(output)
        is_kept = False
        try:
            yield claim
        except BaseException as error:
            # The next run pushes a complete result, unless somebody has changed it in the meantime.
            is_unpushed = is_complete(output) and not isinstance(error, VerificationError)
            is_kept = is_unpushed if claim.is_committed else claim.goes_on
            raise
        finally:
            if not is_kept:
                # What went wrong before matters more; the next run removes what cannot be removed now.
                with suppress(OSError):
                    remove_progress(output) if claim.is_committed else discard(output)


def forget_push(output: Path) -> None:
    """Removes what was kept of a push that ended early, once the result is pushed in another way."""
    place = output / UNFINISHED
    if not is_complete(output) or staging(output).exists():
        return
    # It only matters to a later run, which would find the result on the Hub.
    with suppress(OSError, OwnedError), owning(place):
        remove_progress(output)
    _remove_empty([place])


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _replace_old_lock(output: Path) -> None:
    """Removes what a killed conversion of an earlier version has left: a lock file, with its shards next to it.

    Raises:
        OwnedError: If it still runs.
    """
    path = output / UNFINISHED
    if not path.is_file():
        return
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise OwnedError(None, is_certain=True) from None
    for name in old_files(output):
        (output / name).unlink()
    path.unlink(missing_ok=True)
    lock.release()


def _in_use(output: Path, error: OwnedError) -> OutputError:
    owner = "" if error.owner is None else f": {error.owner}"
    work = work_in(output) or Work.CONVERSION
    if error.is_certain:
        return OutputError(
            f"another {work} is writing to {output}{owner}.",
            hint="wait for it, or choose another folder with `output`",
        )
    return OutputError(
        f"a {work} on another machine is writing to {output}, or was killed there{owner}.",
        hint=f"if it no longer runs, delete {output / UNFINISHED / OWNER}, and run the same command again",
    )
