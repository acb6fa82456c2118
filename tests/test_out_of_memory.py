"""Memory that runs out: recognised in whatever words a library has for it, and reported in one message."""

import errno
import traceback
from collections.abc import Callable

import numpy as np
import pytest
import torch

from hcsmoe_hub.errors import HcsmoeError, OutOfMemoryError, SourceError
from hcsmoe_hub.events import EventLog, Stage, StageAdvanced, ignore
from hcsmoe_hub.machine.out_of_memory import explaining, is_out_of_memory

HOST = torch.device("cpu")
CUDA = "CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 23.65 GiB"
# More than any machine has.
TOO_MUCH = 1 << 55


def raised_by_torch() -> None:
    torch.empty(TOO_MUCH, dtype=torch.uint8)


def raised_by_numpy() -> None:
    np.empty(TOO_MUCH, dtype=np.uint8)


@pytest.mark.parametrize("allocate", [raised_by_torch, raised_by_numpy])
def test_what_the_libraries_raise_here_is_recognised(allocate: Callable[[], None]) -> None:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        allocate()
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(CUDA),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("XPU out of memory. Tried to allocate 20.00 MiB"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        MemoryError(),
        SourceError(f"transformers cannot load layer 1: Traceback ...\ntorch.OutOfMemoryError: {CUDA}", hint="wait"),
    ],
    ids=repr,
)
def test_every_way_to_say_it_is_recognised(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        OSError(errno.ENOSPC, "No space left on device"),
        SourceError("no such folder", hint="name another one"),
        KeyboardInterrupt(),
    ],
    ids=repr,
)
def test_other_errors_are_not(error: BaseException) -> None:
    assert not is_out_of_memory(error)


def test_the_message_says_what_ran_out_where_how_much_is_free_and_what_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hcsmoe_hub.machine.accelerator.free_bytes", lambda device: 900_000_000)
    monkeypatch.setattr("hcsmoe_hub.machine.accelerator.total_bytes", lambda device: 24_000_000_000)
    helps = ["fewer `samples`", "`device='cpu'`"]
    with (
        pytest.raises(OutOfMemoryError) as caught,
        explaining(torch.device("cuda", 0), where=lambda: "in layer 3 (convert)", helps=lambda: helps),
    ):
        raise torch.OutOfMemoryError(CUDA)
    assert caught.value.message == (
        "the memory of cuda:0 ran out in layer 3 (convert): 1.6 GB more were needed, but 900.0 MB of 24.0 GB are free."
    )
    assert caught.value.hint == "use fewer `samples` or `device='cpu'`"
    assert caught.value.option == "samples"


def test_memory_of_the_host_is_named_even_where_layers_run_elsewhere() -> None:
    with (
        pytest.raises(OutOfMemoryError, match=r"^memory ran out: 36028.8 TB more were needed, but ") as caught,
        explaining(torch.device("cuda", 0), where=lambda: "", helps=lambda: ["fewer `samples`"]),
    ):
        raised_by_torch()
    assert caught.value.hint == "use fewer `samples`"


def test_the_message_keeps_no_tensor_alive() -> None:
    def work() -> None:
        held = torch.ones(10_000_000)
        raise MemoryError(len(held))

    with (
        pytest.raises(OutOfMemoryError) as caught,
        explaining(HOST, where=lambda: "", helps=lambda: ["fewer `samples`"]),
    ):
        work()
    assert caught.value.__cause__ is not None
    frames = [frame for frame, _ in traceback.walk_tb(caught.value.__cause__.__traceback__)]
    assert all("held" not in frame.f_locals for frame in frames)


@pytest.mark.parametrize("error", [ValueError("no"), SourceError("no", hint="yes"), OutOfMemoryError("no", hint="x")])
def test_other_errors_and_what_is_explained_already_pass(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, explaining(HOST, where=lambda: "", helps=lambda: ["fewer `samples`"]):
        raise error
    assert caught.value is error


def test_a_log_knows_which_layer_is_at_work() -> None:
    log = EventLog(ignore)
    assert log.place == ""
    with log.timed(Stage.CONVERT, 2):
        assert log.place == "in layer 0 (convert)"
        log.emit(StageAdvanced(Stage.CONVERT, "layer 0"))
        assert log.place == "in layer 1 (convert)"
        log.emit(StageAdvanced(Stage.CONVERT, "layer 1"))
        assert log.place == "in stage 'convert'"


def test_it_is_a_known_failure() -> None:
    assert issubclass(OutOfMemoryError, HcsmoeError)
