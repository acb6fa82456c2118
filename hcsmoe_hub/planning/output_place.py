"""Whether a folder of the wanted name can be made, before anything else is done."""

import os
from pathlib import Path

from hcsmoe_hub.errors import OutputError

HINT = "choose another folder with `output`"


def check_place(output: Path) -> None:
    """Checks the name of the output folder, and the folder that it is made in.

    Raises:
        OutputError: If the name cannot be written into files or is too long, if a part of it is a link that leads
            nowhere, or if nothing can be written there.
    """
    shown = os.fsencode(output).decode("utf-8", "backslashreplace")
    if shown != str(output):
        raise OutputError(f"the name of the output folder, {shown}, is not UTF-8.", hint=HINT)
    if "\0" in shown:
        raise OutputError(f"the name of the output folder, {shown!r}, contains a null character.", hint=HINT)
    path = output.absolute()
    existing = next(place for place in (path, *path.parents) if os.path.lexists(place))
    if not os.path.exists(existing):
        raise OutputError(
            f"{existing} is a link to {os.readlink(existing)}, which does not exist.",
            hint="make that folder, or choose another one with `output`",
        )
    limit = os.pathconf(existing, "PC_NAME_MAX")
    longest = max((len(os.fsencode(part)) for part in path.parts), default=0)
    if longest > limit:
        raise OutputError(
            f"the name of the output folder is too long: {longest} bytes, where the disk allows {limit}.",
            hint="choose a shorter name with `output`",
        )
    if existing.is_dir() and not os.access(existing, os.W_OK | os.X_OK):
        raise OutputError(f"{existing} cannot be written to.", hint=f"check its permissions, or {HINT}")
