"""Pushes a finished result to the Hub.

Importing this module is cheap; the libraries are imported when a push begins.
"""

import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from hcsmoe_hub.errors import OutputError, note_unpushed
from hcsmoe_hub.events import Listener, Stage, StageFinished, StageStarted, ignore
from hcsmoe_hub.options import PushOptions
from hcsmoe_hub.report import Pushed

# The client sends the files of one call in parallel.
FILES_AT_ONCE = 4


def push(folder: Path, options: PushOptions, *, token: str | None = None, listener: Listener = ignore) -> Pushed:
    """Pushes the result in a folder to the Hub, in one commit.

    Args:
        folder: What ``convert`` wrote.
        options: Where to.
        token: Access token; ``None`` uses the stored login.
        listener: Called with every event, from several threads.

    Returns:
        What was done.

    Raises:
        HcsmoeError: For every known failure. Before the commit nothing is visible, and a later push resumes.
    """
    from hcsmoe_hub.planning.push_command import push_command
    from hcsmoe_hub.publishing.files import check_result, checkpoint_files, other_files
    from hcsmoe_hub.publishing.publisher import Publisher
    from hcsmoe_hub.result.claim import forget_push

    publisher = Publisher(folder, options, token=token, listener=listener)
    result = check_result(folder)
    _write_card(folder, options.repo_id)
    files = checkpoint_files(result)
    try:
        publisher.open(files)
        listener(StageStarted(Stage.PUSH, len(files)))
        start = time.perf_counter()
        for first in range(0, len(files), FILES_AT_ONCE):
            publisher.upload(*files[first : first + FILES_AT_ONCE])
        pushed = publisher.commit(*files)
    except KeyboardInterrupt as error:
        note_unpushed(error, push_command(folder, options))
        raise
    forget_push(folder)
    listener(StageFinished(Stage.PUSH, round(time.perf_counter() - start, 3)))
    return replace(pushed, left_out=other_files(folder, files))


def _write_card(folder: Path, repo_id: str) -> None:
    """Lets the card name the repository; one that a person wrote or changed is pushed as it is."""
    from hcsmoe_hub.model_cards import write_card

    with suppress(OutputError):
        write_card(folder, repo_id)
