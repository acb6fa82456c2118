"""The output folder of a recovery: where it is, and what an interrupted one has left there."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hcsmoe_hub.checkpoint.durable import write_json
from hcsmoe_hub.checkpoint.unfinished import IDENTITY, Work, identity_in, is_complete, is_occupied, refuse_other_work
from hcsmoe_hub.checkpoint.unfinished import progress as progress_folder
from hcsmoe_hub.errors import OutputError
from hcsmoe_hub.pipeline.identity import check_identity
from hcsmoe_hub.planning.output_place import HINT, check_place
from hcsmoe_hub.recovery.options import RecoverOptions
from hcsmoe_hub.recovery.states import latest
from hcsmoe_hub.result.claim import Claim
from hcsmoe_hub.result.commit import identity_of_complete

_SUFFIX = "-recovered"


def output_folder(result: str | Path, options: RecoverOptions) -> Path:
    """The folder to write: that of the options, or one next to the result; of a repository, in the current folder."""
    if options.output is not None:
        return options.output
    path = Path(result).expanduser()
    if path.is_dir():
        return path.with_name(f"{path.resolve().name}{_SUFFIX}")
    name = str(result).rstrip("/").partition("@")[0].rpartition("/")[2]
    return Path(f"{name}{_SUFFIX}")


def check_output(output: Path, options: RecoverOptions) -> None:
    """Checks that the output folder can be made, and that nothing is lost there.

    Raises:
        OutputError: If it cannot, or something would be.
    """
    check_place(output)
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output} is a file.", hint=HINT)
    teacher = Path(options.teacher).expanduser()
    if teacher.is_dir() and output.resolve() == teacher.resolve():
        raise OutputError(f"{output} is the teacher itself.", hint=HINT)
    if not options.restart:
        refuse_other_work(output, Work.RECOVERY)
    if is_occupied(output):
        if not options.overwrite:
            raise OutputError(f"{output} is not empty.", hint=f"{HINT}, or add `overwrite=True`")
        if not (output / "config.json").exists() and not any(output.glob("*.safetensors*")):
            raise OutputError(f"{output} holds files but no checkpoint, so `overwrite` does not touch it.", hint=HINT)


def finish_earlier(claim: Claim, asked: Mapping[str, Any], options: RecoverOptions) -> bool:
    """Finishes the move of a complete result; unless it is the wanted one, it counts as an older one from then on.

    Args:
        claim: The output folder.
        asked: From ``identity.asked``.
        options: Of the recovery.

    Returns:
        Whether it is the wanted one.

    Raises:
        OutputError: If it is not, and must not be overwritten.
    """
    if not is_complete(claim.output) or options.restart:
        return False
    before = identity_of_complete(claim.output)
    claim.finish()
    if isinstance(before, Mapping) and all(before.get(name) == value for name, value in asked.items()):
        return True
    if not options.overwrite:
        raise OutputError(
            f"{claim.output} holds a complete result: an earlier run was interrupted while it moved the files, which "
            "is done now.",
            hint="use it, choose another folder with `output`, or add `overwrite=True`",
        )
    claim.release()
    return False


def prepare_folder(claim: Claim, now: Mapping[str, Any], options: RecoverOptions) -> None:
    """Leaves in the output folder what this recovery goes on from.

    Args:
        claim: The output folder.
        now: From ``identity.identity``.
        options: Of the recovery.

    Raises:
        PlanError: If an interrupted recovery was another one.
    """
    folder = progress_folder(claim.output)
    before = None if options.restart else identity_in(claim.output)
    if before is None or latest(folder) is None:
        claim.begin_anew()
        write_json(folder / IDENTITY, now)
        return
    check_identity(before, now, claim.output, kind="recovery")
    claim.goes_on = True
