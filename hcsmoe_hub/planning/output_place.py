"""Whether a folder of the wanted name can be made, before anything else is done."""

import os
from pathlib import Path

from hcsmoe_hub.checkpoint.unfinished import Work, is_occupied, refuse_other_work
from hcsmoe_hub.errors import OutputError
from hcsmoe_hub.planning.conversion_plan import ConversionPlan
from hcsmoe_hub.planning.disk_space import existing_part
from hcsmoe_hub.planning.push_command import push_command
from hcsmoe_hub.report import REPORT_FILE

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


def check_output(plan: ConversionPlan) -> None:
    """Checks that the output folder can be made, and that nothing is lost there.

    Raises:
        OutputError: If it cannot, or something would be.
    """
    output, overwrite = plan.output, plan.options.overwrite
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output} is a file.", hint="choose another folder with `output`")
    source_path = plan.model.source.path
    if source_path is not None and output.resolve() == source_path.resolve():
        raise OutputError(f"{output} is the source itself.", hint="choose another folder with `output`")
    if not plan.options.restart:
        refuse_other_work(output, Work.CONVERSION)
    if is_occupied(output):
        is_checkpoint = (output / "config.json").exists() or any(output.glob("*.safetensors*"))
        if not overwrite:
            push, is_result = plan.options.push, (output / REPORT_FILE).is_file()
            pushing = f"; or push what is there with '{push_command(output, push)}'" if push and is_result else ""
            raise OutputError(
                f"{output} is not empty.", hint=f"choose another folder with `output`, or add `overwrite=True`{pushing}"
            )
        if not is_checkpoint:
            raise OutputError(
                f"{output} holds files but no checkpoint, so `overwrite` does not touch it.",
                hint="choose another folder with `output`",
            )
    existing = existing_part(output)
    if not existing.is_dir():
        raise OutputError(
            f"{existing} is a file, so {output} cannot be made.", hint="choose another folder with `output`"
        )
