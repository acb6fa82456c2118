"""The command that pushes a result which is complete: what messages suggest where only the push is missing."""

import shlex
from pathlib import Path

from hcsmoe_hub.options import PushOptions


def push_command(folder: Path, options: PushOptions) -> str:
    """The command that pushes the result in a folder."""
    words = ["hcsmoe", "push", str(folder), options.repo_id]
    words += [] if options.revision is None else ["--revision", options.revision]
    for name in ("private", "create_pr", "overwrite"):
        words += [f"--{name.replace('_', '-')}"] if getattr(options, name) else []
    return shlex.join(words)
