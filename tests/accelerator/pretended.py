"""A pretended accelerator: builds the device of ``pretended.cpp``, switches it on, and counts what work on it costs.

    python pretended.py [--limit MB] [--fail-at N] convert MODEL ... --device cuda

runs the command line of hcsmoe on it and prints the counts. A process that called ``switch_on`` keeps the device, and
torch takes it for an accelerator of the machine from then on: tests use processes of their own.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import types
from collections import Counter
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

NAME = "pretended"
SOURCE = Path(__file__).with_suffix(".cpp")
PARTS = (SOURCE, SOURCE.with_name("pretended_memory.h"), SOURCE.with_name("pretended_rules.h"))
# What the device has unless a test says otherwise.
CAPACITY = 80_000_000_000
# Events after which a program on CUDA has waited for all that it had asked for.
WAITS = ("item", "wait", "down", "up")
_PACKAGE = f"{os.sep}hcsmoe_hub{os.sep}"


def missing_tool() -> str | None:
    """What the machine lacks for building the device, or ``None``."""
    _find_scripts()
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        return f"the C++ compiler `{compiler}` (`apt install g++`)"
    return None if shutil.which("ninja") else "`ninja` (`pip install ninja`)"


def _find_scripts() -> None:
    """Puts the scripts of this environment on the path, where those of an environment that is not activated are not."""
    scripts = sysconfig.get_path("scripts")
    if scripts not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] = scripts + os.pathsep + os.environ["PATH"]


def build() -> Path:
    """The compiled device: built at the first call for this source, torch and Python, by one process at a time."""
    parts = b"".join(part.read_bytes() for part in PARTS)
    key = sha256(parts + torch.__version__.encode() + sys.version.encode()).hexdigest()[:12]
    folder = (
        Path(os.environ.get("HCSMOE_PRETENDED", Path(tempfile.gettempdir()) / f"hcsmoe-{NAME}-{os.getuid()}")) / key
    )
    library = folder / f"{NAME}.so"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "building"):
        if not library.exists():
            # In a folder of its own, so that an interrupted build leaves nothing that others wait for; and in a process
            # of its own, as building loads what was built.
            with tempfile.TemporaryDirectory(dir=folder) as work:
                code = (
                    "import sys, torch; from torch.utils import cpp_extension; name, source, folder = sys.argv[1:];"
                    "flags = ['-O1', '-g0', '-w', '-DAT_PER_OPERATOR_HEADERS'];"
                    "cpp_extension.load(name, [source], extra_cflags=flags, build_directory=folder)"
                )
                _find_scripts()
                done = subprocess.run(
                    [sys.executable, "-P", "-c", code, NAME, str(SOURCE), work], capture_output=True, text=True
                )
                if done.returncode:
                    raise RuntimeError(f"the pretended accelerator cannot be built:\n{done.stdout}\n{done.stderr}")
                (Path(work) / library.name).rename(library)
    return library


@cache
def switch_on(*, has_bf16: bool = False) -> Any:
    """Makes torch and hcsmoe use the device in this process.

    Args:
        has_bf16: Whether it says that it multiplies bfloat16; otherwise layers are computed in float32, as on a host
            without such instructions.

    Returns:
        The compiled device: ``memory()``, ``launches()``, ``reset(counts)``, ``limit(bytes)``, ``fail_at(n)``.
    """
    library = build()
    torch.utils.rename_privateuse1_backend(NAME)
    spec = importlib.util.spec_from_file_location(NAME, library)
    assert spec is not None
    assert spec.loader is not None
    device = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(device)
    torch._register_device_module(NAME, _interface(device, has_bf16=has_bf16))
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    device.limit(CAPACITY)

    from hcsmoe_hub.machine import accelerator

    accelerator.KIND = NAME
    return device


def _interface(device: Any, *, has_bf16: bool) -> types.ModuleType:
    """What torch offers for a kind of device, as ``torch.cuda`` does for CUDA."""
    module = types.ModuleType(f"torch.{NAME}")

    def used(_: Any = None) -> int:
        return int(device.memory()["used"])

    def free(_: Any = None) -> tuple[int, int]:
        memory = device.memory()
        return memory["capacity"] - memory["used"], memory["capacity"]

    def nothing(*_: Any, **__: Any) -> None:
        pass

    class Stream(torch.Stream):
        def __new__(cls, device: Any = None, priority: int = 0, **others: Any) -> "Stream":
            return super().__new__(cls, **others) if others else super().__new__(cls, f"{NAME}:0", priority=priority)

    class Event(torch.Event):
        def __new__(cls, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> "Event":
            return super().__new__(cls, f"{NAME}:0", enable_timing=enable_timing, blocking=blocking)

    functions: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda _=None: NAME,
        "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16],
        "is_bf16_supported": lambda including_emulation=True: has_bf16 or including_emulation,
        "mem_get_info": free,
        "memory_allocated": used,
        "memory_reserved": used,
        "max_memory_allocated": lambda _=None: int(device.memory()["peak"]),
        "max_memory_reserved": lambda _=None: int(device.memory()["peak"]),
        "reset_peak_memory_stats": lambda _=None: device.reset(False),
        "Stream": Stream,
        "Event": Event,
        "stream": lambda stream: stream,
        "current_stream": lambda _=None: torch.accelerator.current_stream(f"{NAME}:0"),
        "default_stream": lambda _=None: torch.Stream(stream_id=0, device_index=0, device_type=20),
        "synchronize": lambda _=None: torch.accelerator.synchronize(),
    }
    for name in ("set_device", "init", "manual_seed", "manual_seed_all", "empty_cache"):
        functions[name] = nothing
    for name, function in functions.items():
        setattr(module, name, function)
    return module


class Counts:
    """Counts copies between host and device, and waits, by the line of hcsmoe that caused them, while it is entered.

    Attributes:
        events: How often, by kind and line. Kinds: ``item`` (a value that is read), ``wait`` (an operator that has to
            know values, or a wait that is asked for), ``aside`` (such a wait of another thread than the first), ``up``
            and ``down`` (copies that block), ``up-free`` and ``down-free`` (copies that do not).
        bytes: The same for bytes.
    """

    def __init__(self, device: Any) -> None:
        self._device = device
        self.events: Counter[tuple[str, str]] = Counter()
        self.bytes: Counter[tuple[str, str]] = Counter()

    def __enter__(self) -> "Counts":
        self._device.reset(True)
        self._device.listen(self._hear)
        return self

    def __exit__(self, *_: Any) -> None:
        self._device.listen(None)

    def _hear(self, kind: str, name: str, size: int) -> None:
        frame = sys._getframe()
        while frame is not None and _PACKAGE not in frame.f_code.co_filename:
            frame = frame.f_back
        line = "elsewhere" if frame is None else f"{frame.f_code.co_filename.rpartition(_PACKAGE)[2]}:{frame.f_lineno}"
        # Threads that read and write wait for their own copies only, while the program goes on.
        if kind == "wait" and threading.current_thread() is not threading.main_thread():
            kind = "aside"
        self.events[kind, line] += 1
        self.bytes[kind, line] += size

    @property
    def waits(self) -> int:
        """How often the program stood still until the device had done all that it was asked for."""
        return sum(count for (kind, _), count in self.events.items() if kind in WAITS)

    @property
    def up(self) -> int:
        """Bytes from the host to the device."""
        return sum(size for (kind, _), size in self.bytes.items() if kind.startswith("up"))

    @property
    def down(self) -> int:
        """Bytes from the device to the host."""
        return sum(size for (kind, _), size in self.bytes.items() if kind.startswith("down"))

    @property
    def launches(self) -> int:
        """Operators that the device ran."""
        return sum(self._device.launches().values())

    def lines(self, limit: int = 20) -> list[str]:
        """The lines that wait or copy most often."""
        return [
            f"{count:7} {kind:9} {self.bytes[kind, line] / 1e6:9.3f} MB  {line}"
            for (kind, line), count in self.events.most_common(limit)
        ]


def main(arguments: list[str]) -> None:
    """Runs the command line of hcsmoe, after the options of the device."""
    device = switch_on()
    while arguments and arguments[0] in ("--limit", "--fail-at"):
        name, value = arguments[:2]
        device.limit(int(float(value) * 1e6)) if name == "--limit" else device.fail_at(int(value))
        arguments = arguments[2:]
    from hcsmoe_hub.cli import main as command

    sys.argv = ["hcsmoe", *arguments]
    counts = Counts(device)
    try:
        with counts:
            command()
    finally:
        copied = f"{counts.up / 1e6:.3f} MB up, {counts.down / 1e6:.3f} MB down"
        figures = f"{counts.launches} launches, {counts.waits} waits, {copied}; {device.memory()}"
        print(figures, *counts.lines(), sep="\n", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
