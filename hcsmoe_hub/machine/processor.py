"""What the processor of this machine is called."""

import platform
from contextlib import suppress
from pathlib import Path

# Where Linux describes processors.
_PROCESSORS = Path("/proc/cpuinfo")


def processor_name() -> str:
    """The model of the processor, as the system names it; its architecture where the system does not."""
    with suppress(OSError):
        for line in _PROCESSORS.read_text("utf-8").splitlines():
            key, _, name = line.partition(":")
            if key.strip() == "model name" and name.strip():
                return " ".join(name.split())
    return platform.processor() or platform.machine()
