"""A program that does what a reader of the documentation would do: one JSON request per line, one JSON answer per line.

A request is ``{"folder", "words"}`` for a command, or ``{"folder", "code", "page"}`` for a Python block; blocks of a
page share their names. An answer is ``{"output", "failure"}``, the second null if all went well.
"""

import json
import os
import sys
import traceback
from collections import defaultdict
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

from huggingface_hub import snapshot_download
from typer.testing import CliRunner

from hcsmoe_hub import options
from hcsmoe_hub.cli.app import app
from hcsmoe_hub.hub import retry

# The only thing that differs from what a reader gets: the models are tiny, and so is their calibration text.
CALIBRATION_TOKENS = 256
SCREEN = {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}


def run(words: list[str]) -> tuple[str, str | None]:
    """Runs a command of ``hcsmoe``, or ``hf download``."""
    if words[:2] == ["hf", "download"]:
        repo_id, option, folder = words[2:]
        assert option == "--local-dir"
        return snapshot_download(repo_id, local_dir=folder), None
    assert words[0] == "hcsmoe"
    done = CliRunner().invoke(app, words[1:], env=SCREEN, prog_name="hcsmoe")
    if done.exit_code == 0:
        return done.stdout, None
    error = done.exception
    trace = [] if error is None or isinstance(error, SystemExit) else traceback.format_exception(error)
    return done.stdout, f"exit code {done.exit_code}\n{done.stdout}{done.stderr}{''.join(trace)}"


def execute(code: str, names: dict[str, Any]) -> tuple[str, str | None]:
    """Runs a Python block; any exception of it is an answer."""
    output = StringIO()
    try:
        with redirect_stdout(output):
            exec(compile(code, "<documentation>", "exec"), names)
    except BaseException:
        return output.getvalue(), traceback.format_exc()
    return output.getvalue(), None


def main() -> None:
    usual = options.default_samples.__globals__
    assert {"DEFAULT_TOKENS", "FITTED_TOKENS"} <= usual.keys()
    usual["DEFAULT_TOKENS"] = usual["FITTED_TOKENS"] = CALIBRATION_TOKENS
    retry.PAUSES_SECONDS = (0.05,) * 4
    # Whatever a library prints goes elsewhere: the answers are alone on the pipe.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    names: defaultdict[str, dict[str, Any]] = defaultdict(lambda: {"__name__": "__main__"})
    for line in sys.stdin:
        request = json.loads(line)
        os.chdir(request["folder"])
        is_command = "words" in request
        output, failure = run(request["words"]) if is_command else execute(request["code"], names[request["page"]])
        print(json.dumps({"output": output, "failure": failure}), file=answers, flush=True)


if __name__ == "__main__":
    main()
