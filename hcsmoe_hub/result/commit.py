"""The moment at which a result becomes one: complete in a folder of its own, it is moved to where it belongs.

First a list of the files is written, so that a move which is cut short can be finished by the next run. If the result
is to be pushed, the list stays until that is done, so that the next run pushes what is complete. An older result loses
its config and its index before anything else, and the new one gets its own last: at no moment are there files of two
results that a program takes for one.
"""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from hcsmoe_hub.checkpoint.bounded_json import read_object
from hcsmoe_hub.checkpoint.durable import INCOMPLETE, sync_folder, sync_tree, write_bytes, write_json
from hcsmoe_hub.checkpoint.owner import LOCK, OWNER
from hcsmoe_hub.checkpoint.sidecars import sidecar_files
from hcsmoe_hub.checkpoint.tensors import INDEX_FILE
from hcsmoe_hub.checkpoint.unfinished import COMPLETE, EXPLANATION, IDENTITY, PROGRESS, UNFINISHED, staging
from hcsmoe_hub.errors import OutputError
from hcsmoe_hub.report import (
    BENCHMARK_FILE,
    EVALUATION_FILE,
    FIGURE_FILE,
    NEURONS_FILE,
    REPORT_FILE,
    SINGULAR_VALUES_FILE,
)

CONFIG_FILE = "config.json"
# In the order in which they appear; they are removed in the opposite order.
_MARKS = (INDEX_FILE, CONFIG_FILE)

# What becomes of the folder of the journal before it is removed.
_GONE = "gone"

_UNPUSHED = """The model in the folder above is complete, but its push to the Hub was not.

To push it, run the same command again. If you do not want that, delete this folder.
"""


def commit_result(output: Path, *, is_pushed: bool = False) -> None:
    """Moves a result that is complete in its staging folder to its output folder, in place of an older one.

    Args:
        output: The output folder.
        is_pushed: Whether the result is pushed afterwards: the list of its files then stays, until ``remove_progress``.
    """
    folder = staging(output)
    sync_tree(folder)
    files = files_below(folder)
    content = {
        "files": _marks_last(files),
        "remove": _marks_last(old_files(output))[::-1],
        "identity": read_object(output / UNFINISHED / PROGRESS / IDENTITY),
        "is_pushed": is_pushed,
    }
    write_json(output / UNFINISHED / COMPLETE, content)
    finish_moves(output)


def identity_of_complete(output: Path) -> Any:
    """What identifies the conversion whose result is complete, but not in its place; ``None`` if that was not kept."""
    content = read_object(output / UNFINISHED / COMPLETE)
    return None if content is None else content.get("identity")


def finish_moves(output: Path) -> None:
    """Does what is left to do of the move of a complete result; safe to begin again at any moment.

    Args:
        output: The output folder.

    Raises:
        OutputError: If the list of its files is damaged.
    """
    folder, content = staging(output), _read_list(output / UNFINISHED / COMPLETE)
    files, old, is_pushed = content["files"], content["remove"], content.get("is_pushed") is True
    # What is no longer in the staging folder has been moved already.
    _remove(output, [name for name in old if name not in files or (folder / name).exists()])
    sync_folder(output)
    for name in files:
        if not (folder / name).exists():
            continue
        target = output / name
        if name in _MARKS:
            sync_folder(output)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(folder / name, target)
        if target.parent != output:
            sync_folder(target.parent)
    sync_folder(output)
    if is_pushed:
        # From here on, a file of such a name is a new one.
        write_json(output / UNFINISHED / COMPLETE, {**content, "remove": []})
    remove_progress(output, keeps_list=is_pushed)
    if is_pushed:
        write_bytes(output / UNFINISHED / EXPLANATION, _UNPUSHED.encode())


def remove_progress(output: Path, *, keeps_list: bool = False) -> None:
    """Removes everything of an unfinished conversion but its lock, in an order that the next run understands.

    Args:
        output: The output folder.
        keeps_list: Whether the list of the files of a complete result stays.
    """
    place = output / UNFINISHED
    # Anyone who finds a journal counts on the files that it lists: it goes first, and at once.
    if (place / PROGRESS).exists():
        os.replace(place / PROGRESS, place / _GONE)
    for folder in (place / _GONE, staging(output)):
        if folder.exists():
            shutil.rmtree(folder)
    # The list of moves comes last: without it, nobody would know that the result is complete.
    for file in place.iterdir():
        if file.is_file() and file.name not in (LOCK, OWNER, COMPLETE):
            file.unlink()
    if not keeps_list:
        (place / COMPLETE).unlink(missing_ok=True)


def discard(output: Path) -> None:
    """Removes everything of an unfinished conversion but its lock, also what of it was moved already."""
    if (output / UNFINISHED / COMPLETE).is_file():
        files = _read_list(output / UNFINISHED / COMPLETE)["files"]
        _remove(output, [name for name in reversed(files) if not (staging(output) / name).exists()])
    remove_progress(output)


def old_files(output: Path) -> list[str]:
    """The files of an older result in a folder, and what was left there of one; not the user's other files."""
    present = files_below(output)
    sidecars = sidecar_files(present, lambda name: (output / name).read_text(encoding="utf-8-sig", errors="replace"))
    reports = (REPORT_FILE, NEURONS_FILE, FIGURE_FILE, SINGULAR_VALUES_FILE, EVALUATION_FILE, BENCHMARK_FILE)
    ends = (".safetensors", ".safetensors.index.json", INCOMPLETE)
    found = {CONFIG_FILE, *reports, *sidecars}
    return [name for name in present if name in found or ("/" not in name and name.endswith(ends))]


def files_below(folder: Path) -> list[str]:
    """Names of all files below a folder, sorted; those of an unfinished conversion in it do not count."""
    names = (file.relative_to(folder) for file in folder.rglob("*") if file.is_file() or file.is_symlink())
    return sorted(name.as_posix() for name in names if name.parts[0] != UNFINISHED)


def _marks_last(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: _MARKS.index(name) if name in _MARKS else -1)


def _read_list(path: Path) -> dict[str, Any]:
    """The list of a complete result: ``files`` to move, and older ones to ``remove``.

    Raises:
        OutputError: If they are not names of files below a folder.
    """
    content = read_object(path) or {}
    try:
        names = (*content["files"], *content["remove"])
        is_sound = all(isinstance(name, str) and _is_below(name) for name in names)
    except (KeyError, TypeError):
        is_sound = False
    if not is_sound:
        raise OutputError(
            f"{path} is damaged, so the move of a complete result cannot be finished.",
            hint=f"move the files of {staging(path.parent.parent)} by hand, or delete {path.parent}",
        )
    return content


def _is_below(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\0" not in name and bool(path.parts)


def _remove(folder: Path, files: Iterable[str]) -> None:
    """Removes files, and sub-folders that become empty."""
    for file in files:
        (folder / file).unlink(missing_ok=True)
        for parent in (folder / file).parents:
            if parent == folder or not parent.is_dir() or any(parent.iterdir()):
                break
            parent.rmdir()
