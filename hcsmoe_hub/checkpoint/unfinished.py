"""The folder in an output folder that holds a conversion or a recovery until it is complete."""

from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from hcsmoe_hub.checkpoint.bounded_json import read_object
from hcsmoe_hub.checkpoint.owner import read_owner
from hcsmoe_hub.errors import OutputError, SourceError

# Everything that a running conversion writes lies in this folder of the output folder; a killed one leaves it behind.
UNFINISHED = "hcsmoe.incomplete"
# In there: the files of the result under their final names, and what the next run needs in order to go on.
RESULT = "result"
PROGRESS = "progress"
# In the latter: what identifies the conversion or recovery.
IDENTITY = "plan.json"
# The item of it that says which of them it is; a conversion has none.
WORK = "work"
# In there as well: what this is, and once the result is complete, which files are to be moved.
EXPLANATION = "README.txt"
COMPLETE = "complete.json"


class Work(StrEnum):
    """What makes the files of an output folder."""

    CONVERSION = "conversion"
    RECOVERY = "recovery"


def staging(output: Path) -> Path:
    """Folder of the files of a result until it is complete."""
    return output / UNFINISHED / RESULT


def progress(output: Path) -> Path:
    """Folder of what the next run needs in order to go on."""
    return output / UNFINISHED / PROGRESS


def is_complete(output: Path) -> bool:
    """Whether a result is complete, and only the move to its final place or the push of it was interrupted."""
    return (output / UNFINISHED / COMPLETE).is_file()


def identity_in(output: Path) -> dict[str, Any] | None:
    """What identifies the conversion or recovery that is not complete; ``None`` if there is none, or it is damaged."""
    return read_object(progress(output) / IDENTITY)


def work_in(output: Path) -> Work | None:
    """What an output folder holds that is not complete, or not in its place; ``None`` if nothing says so."""
    if is_complete(output):
        complete = read_object(output / UNFINISHED / COMPLETE)
        identity = None if complete is None else complete.get("identity")
    else:
        identity = identity_in(output)
    if not isinstance(identity, dict):
        return None
    return Work.RECOVERY if identity.get(WORK) == Work.RECOVERY else Work.CONVERSION


def refuse_other_work(output: Path, work: Work) -> None:
    """Refuses an output folder in which a conversion would take the place of an interrupted recovery, or vice versa.

    Args:
        output: The folder.
        work: What is to write to it.

    Raises:
        OutputError: If it holds an interrupted one of the other kind.
    """
    found = work_in(output)
    if found in (None, work) or is_complete(output):
        return
    raise OutputError(
        f"{output} holds an interrupted {found}, begun {_time_of(output / UNFINISHED)}, which a {work} would replace.",
        hint=f"finish the {found} with the command that began it, choose another folder with `output`, or add "
        "`restart=True` to give it up",
    )


def is_occupied(output: Path) -> bool:
    """Whether an output folder holds anything that a conversion or recovery must not touch.

    Where there is an unfinished one, the folder was free when that began: only an older result counts.
    """
    # Earlier versions had a lock file of this name, and left their shards next to it.
    if not output.is_dir() or is_complete(output) or (output / UNFINISHED).is_file():
        return False
    if (output / UNFINISHED).exists():
        return (output / "config.json").exists() or any(output.glob("*.safetensors*"))
    return any(output.iterdir())


def refuse_unfinished(folder: Path) -> None:
    """Refuses a folder that holds a conversion or recovery which is not complete, or lies within that.

    Raises:
        SourceError: If it does; an older result that is still there is not refused.
    """
    path = folder.absolute()
    if UNFINISHED in path.parts:
        path = Path(*path.parts[: path.parts.index(UNFINISHED)])
        shown = str(path)
    elif (path / UNFINISHED).exists() and not (path / "config.json").exists():
        shown = str(folder)
    else:
        return
    place, work = path / UNFINISHED, work_in(path) or Work.CONVERSION
    owner = read_owner(place)
    if owner is not None and owner.is_visible and owner.runs:
        raise SourceError(
            f"{shown} does not hold a finished model yet: a {work} is writing to it ({owner}).",
            hint="wait until it is done",
        )
    if is_complete(path):
        raise SourceError(
            f"{shown} holds a {work} that was interrupted while its files were moved to their places.",
            hint="run the same command again, which moves the others",
        )
    raise SourceError(
        f"{shown} holds an unfinished {work}, begun {_time_of(place)}, and not a model.",
        hint=f"run the same command again to go on, or delete {place} to give it up",
    )


def _time_of(place: Path) -> str:
    explanation = place / EXPLANATION
    changed = (explanation if explanation.exists() else place).stat().st_mtime
    return datetime.fromtimestamp(changed, UTC).strftime("%Y-%m-%d %H:%M UTC")
