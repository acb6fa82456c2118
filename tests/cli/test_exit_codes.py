"""0 done, 1 a known failure with one message, 2 usage, 130 interrupted; a bug keeps its traceback."""

import errno
import shlex
import signal
import subprocess
import sys

import pytest

from hcsmoe_hub.errors import OutputError, PlanError, note_kept


@pytest.fixture
def fails(monkeypatch):
    """Makes planning raise what it is given."""

    def install(error):
        def plan(*args, **kwargs):
            raise error

        monkeypatch.setattr("hcsmoe_hub.cli.convert.plan", plan)
        return "convert", "model", "--experts", "4", "--dry-run"

    return install


def test_known_failure_is_a_message_and_a_hint_on_stderr(run, fails):
    result = run(*fails(PlanError("the [bold] thing is too large.", hint="use a smaller one")))
    assert result.code == 1
    assert result.stdout == ""
    assert result.stderr == "Error: the [bold] thing is too large.\nHint: use a smaller one\n"


def test_long_message_is_not_wrapped(run, fails):
    message = "a path that is " + "very/" * 100 + "long."
    assert run(*fails(PlanError(message, hint="use less"))).stderr == f"Error: {message}\nHint: use less\n"


@pytest.mark.parametrize("mode", ["--json", "--quiet"])
def test_known_failure_leaves_stdout_empty_in_every_mode(run, fails, mode):
    result = run(*fails(PlanError("it does not fit.", hint="use less")), mode)
    assert (result.code, result.stdout, result.stderr) == (1, "", "Error: it does not fit.\nHint: use less\n")


@pytest.mark.parametrize("value", ["1", "yes"])
def test_debug_variable_adds_the_traceback(run, fails, value):
    result = run(*fails(PlanError("it does not fit.", hint="use less")), HCSMOE_DEBUG=value)
    assert result.code == 1
    assert result.stderr.startswith("Traceback")
    assert result.stderr.endswith("Error: it does not fit.\nHint: use less\n")


def test_debug_variable_of_zero_is_off(run, fails):
    assert "Traceback" not in run(*fails(PlanError("it does not fit.", hint="use less")), HCSMOE_DEBUG="0").stderr


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.ENAMETOOLONG, errno.EMFILE, errno.EIO])
def test_full_disk_and_missing_permission_are_known_failures(run, fails, number):
    result = run(*fails(OSError(number, "it cannot be", "out/model.safetensors")))
    assert result.code == 1
    assert result.stderr.startswith("Error: it cannot be: out/model.safetensors.\nHint: ")


@pytest.mark.parametrize(
    "error", [OSError(errno.EINVAL, "invalid argument"), ValueError("a bug"), RuntimeError("a bug")]
)
def test_unknown_exception_is_not_dressed_up(run, fails, error):
    result = run(*fails(error))
    assert result.exception is error
    assert "Error:" not in result.everything


@pytest.mark.parametrize("endpoint", ["http://[bad", "http://host:port"])
def test_malformed_endpoint_is_a_known_failure(run, endpoint):
    result = run("inspect", "org/name", HF_ENDPOINT=endpoint)
    assert (result.code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"Error: HF_ENDPOINT is {endpoint!r}, which is not an address: ")


def test_interrupt_is_one_line_and_130(run, fails):
    result = run(*fails(KeyboardInterrupt()))
    assert (result.code, result.stdout, result.stderr) == (130, "", "Interrupted.\n")


def test_interrupt_that_keeps_work_says_where_it_was_and_what_goes_on(run, fails):
    error = KeyboardInterrupt()
    note_kept(error, "in layer 3 (convert)")
    words = [*fails(error), "--restart", "--output", "my model", "--token", "hf_secret"]
    result = run(*words)
    assert result.code == 130
    message, hint = result.stderr.splitlines()
    assert message == "Interrupted in layer 3 (convert); what was done before is kept."
    assert hint == "Hint: go on with: hcsmoe convert model --experts 4 --dry-run --output 'my model' --token ..."
    assert "hf_secret" not in result.everything


@pytest.mark.parametrize(
    "error",
    [OutputError("the folder is gone.", hint="make it again"), OSError(errno.ENOSPC, "No space left on device")],
    ids=["known", "system"],
)
def test_failure_that_keeps_work_says_what_goes_on_once_it_is_repaired(run, fails, error):
    note_kept(error, "in layer 3 (convert)")
    result = run(*fails(error), "--token=hf_secret")
    assert result.code == 1
    message, hint, then = result.stderr.splitlines()
    assert message.startswith("Error: ")
    assert hint.startswith("Hint: ")
    assert then == "Then: go on with: hcsmoe convert model --experts 4 --dry-run --token=..."


# Sends itself a signal when a layer is through.
STOPPED_IN_LAYER = """
import os, sys
import hcsmoe_hub.cli.convert as command
from hcsmoe_hub.cli import main
from hcsmoe_hub.events import Stage, StageAdvanced
execute, number = command.execute, int(sys.argv.pop(1))
def stopped(plan, *, token, listener):
    def listen(event):
        listener(event)
        if isinstance(event, StageAdvanced) and event.stage is Stage.CONVERT and event.detail == "layer 2":
            os.kill(os.getpid(), number)
    return execute(plan, token=token, listener=listen)
command.execute = stopped
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_stopped_conversion_goes_on_with_the_command_that_it_prints(run, quick, tmp_path, number):
    output = tmp_path / "my result"
    words = [sys.executable, "-c", STOPPED_IN_LAYER, str(int(number)), *quick, "--output", str(output)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (130, "")
    message, hint = done.stderr.splitlines()[-2:]
    assert message == "Interrupted in layer 3 (convert); what was done before is kept."
    start = "Hint: go on with: "
    assert hint.startswith(start)
    assert [path.name for path in output.iterdir()] == ["hcsmoe.incomplete"]
    assert run("verify", output).code == 1
    result = run(*shlex.split(hint.removeprefix(start))[1:])
    assert result.code == 0, result.everything
    assert not (output / "hcsmoe.incomplete").exists()


def test_interrupted_conversion_without_checkpoints_leaves_nothing_behind(quick, tmp_path):
    code = "from hcsmoe_hub.cli import main; main()"
    words = [sys.executable, "-c", code, *quick, "--no-checkpoint", "--output", str(tmp_path / "result")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        # Layers are being converted, so the interrupt does not meet an import, which may swallow it.
        assert any(line.startswith("convert") for line in process.stderr)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate()
    assert process.returncode == 130
    assert stdout == ""
    assert stderr.endswith("Interrupted.\n")
    assert list(tmp_path.iterdir()) == []


def test_missing_folder_is_a_known_failure(run):
    result = run("convert", "./no/such/folder", "--experts", "4")
    assert result.code == 1
    assert "Error: there is no folder ./no/such/folder." in result.stderr
