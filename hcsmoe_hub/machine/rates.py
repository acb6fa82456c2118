"""How fast this machine multiplies, copies, reads and writes: measured once, in a few seconds, and kept in a file."""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from hcsmoe_hub.machine import accelerator, rates_file
from hcsmoe_hub.machine.device import compute_dtype
from hcsmoe_hub.machine.precision import fast_products

# Rows and columns of square products, the smallest first; a probe stops at the first that takes long enough to time.
_SIZES = (256, 512, 1024, 2048, 4096, 8192)
_LONG_ENOUGH = 0.02
# Rows of an expert that few tokens are routed to.
_FEW_ROWS = 32
# How often every probe runs. The best one counts: other programs can only slow a probe down.
_PROBES = 3
# Of a busy machine, the time of the processor counts, at most this many times over for threads that wait for others.
_WAITING = 1.5
_MEMORY_NUMBERS = 1 << 23
_SMALL_OPERATIONS = 200
_COPY_BYTES = 1 << 28
_DISK_BYTES = 1 << 26
# Of a disk that cannot be tried, as nobody may write to it.
ASSUMED_DISK_BYTES_PER_SECOND = 5e8

Rate = Annotated[float, Field(gt=0)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Products:
    """Rates of matrix products on one device, in floating-point operations per second.

    Attributes:
        float32: Of float32 numbers.
        float64: Of float64 numbers.
        bfloat16: Of bfloat16 numbers; that of float32 where the device has no instructions for them.
        tf32: Of float32 numbers that are rounded to TF32; that of float32 where the device does not round.
        few_rows: Of 32 rows with a matrix, in the dtype that layers are computed in.
    """

    float32: Rate
    float64: Rate
    bfloat16: Rate
    tf32: Rate
    few_rows: Rate

    def of(self, dtype: torch.dtype) -> float:
        """The rate of products in a dtype; float16 is as fast as bfloat16."""
        if dtype == torch.float64:
            return self.float64
        return self.float32 if dtype == torch.float32 else self.bfloat16


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRates:
    """How fast one device computes.

    Attributes:
        products: Rates of matrix products.
        memory: Bytes per second that operations on single numbers read and write.
        launch_seconds: Time of an operation that has next to nothing to do.
        to_device: Bytes per second from pinned memory of the host; infinite where the device is the host.
        to_host: Bytes per second back to it.
        host_memory: Bytes per second that operations on single numbers read and write on the host.
    """

    products: Products
    memory: Rate
    launch_seconds: Rate
    to_device: Rate
    to_host: Rate
    host_memory: Rate


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskRates:
    """How fast a disk is, in bytes per second.

    Attributes:
        read: Sequential reading of what is not in the page cache, as far as the system lets go of it.
        write: Sequential writing until the disk says that it is there.
    """

    read: Rate
    write: Rate


ASSUMED_DISK = DiskRates(read=ASSUMED_DISK_BYTES_PER_SECOND, write=ASSUMED_DISK_BYTES_PER_SECOND)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What an estimate of time is computed from.

    Attributes:
        device: The device that runs the layers.
        source_disk: Where the source is, or is downloaded to.
        output_disk: Where the result is written.
    """

    device: DeviceRates
    source_disk: DiskRates
    output_disk: DiskRates


def machine_rates(device: torch.device, *, source: Path, output: Path) -> Rates:
    """The rates of this machine: those that an earlier run has measured, otherwise measured now and kept.

    Args:
        device: Runs the layers.
        source: An existing folder on the disk of the source.
        output: An existing folder on the disk of the result.
    """
    name = rates_file.device_key(device)
    computing = rates_file.recall(name, DeviceRates) or _kept(name, measure_device(device))
    return Rates(device=computing, source_disk=_disk(source), output_disk=_disk(output))


def _kept(name: str, found: DeviceRates) -> DeviceRates:
    rates_file.keep(name, found)
    return found


def _disk(folder: Path) -> DiskRates:
    """Rates of the disk of a folder. Those of a disk that cannot be tried are assumed, and not kept."""
    name = rates_file.disk_key(folder)
    recalled = rates_file.recall(name, DiskRates)
    if recalled is not None:
        return recalled
    found = measure_disk(folder)
    if found is None:
        return ASSUMED_DISK
    rates_file.keep(name, found)
    return found


def measure_device(device: torch.device) -> DeviceRates:
    """Measures how fast a device computes, and copies if it is not the host."""
    is_host = accelerator.is_host(device)
    memory = _memory_rate(device)
    return DeviceRates(
        products=measure_products(device),
        memory=memory,
        launch_seconds=_launch_seconds(device),
        to_device=float("inf") if is_host else copy_rate(device, to_host=False),
        to_host=float("inf") if is_host else copy_rate(device, to_host=True),
        host_memory=memory if is_host else _memory_rate(accelerator.HOST),
    )


def measure_products(device: torch.device) -> Products:
    """Measures matrix products of the dtypes that a conversion uses."""
    dtype = compute_dtype(device)
    float32 = product_rate(device, torch.float32)
    return Products(
        float32=float32,
        float64=product_rate(device, torch.float64),
        # Without instructions for a dtype, one probe would take longer than all the others.
        bfloat16=float32 if dtype == torch.float32 else product_rate(device, dtype),
        tf32=float32 if accelerator.is_host(device) else _tf32_rate(device),
        few_rows=product_rate(device, dtype, rows=_FEW_ROWS),
    )


def product_rate(device: torch.device, dtype: torch.dtype, *, rows: int | None = None) -> float:
    """Floating-point operations per second of products with a square matrix.

    Args:
        device: Where they are computed.
        dtype: Of all numbers.
        rows: Rows of the other matrix; as many as the square one has, unless given.
    """
    rate = 0.0
    # The first product of a process loads the library that computes it.
    _product(_SIZES[0], _SIZES[0], dtype, device)()
    for size in _SIZES:
        seconds = _best(_product(rows or size, size, dtype, device), device)
        rate = max(rate, 2 * (rows or size) * size * size / seconds)
        if seconds >= _LONG_ENOUGH:
            break
    return rate


def _product(rows: int, size: int, dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor]:
    left, right = (_matrix(count, size, dtype, device) for count in (rows, size))
    return lambda: nn.functional.linear(left, right)


def _matrix(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((rows, columns), 0.5, dtype=dtype, device=device)


def _tf32_rate(device: torch.device) -> float:
    with fast_products(device):
        return product_rate(device, torch.float32)


def _memory_rate(device: torch.device) -> float:
    """Bytes per second of a sum of two tensors that no cache holds."""
    one, two, total = (torch.ones(_MEMORY_NUMBERS, device=device) for _ in range(3))
    return 3 * one.nbytes / _best(lambda: torch.add(one, two, out=total), device)


def _launch_seconds(device: torch.device) -> float:
    small = torch.ones(8, device=device)

    def work() -> None:
        for _ in range(_SMALL_OPERATIONS):
            small.add_(1)

    return _best(work, device) / _SMALL_OPERATIONS


def copy_rate(device: torch.device, *, to_host: bool, pinned: bool = True) -> float:
    """Bytes per second between the host and an accelerator.

    Args:
        device: The accelerator.
        to_host: Whether the bytes come from there.
        pinned: Whether the memory of the host is pinned.
    """
    host = torch.empty(_COPY_BYTES, dtype=torch.uint8)
    host = host.pin_memory(device) if pinned else host
    placed = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=device)
    into, source = (host, placed) if to_host else (placed, host)
    return _COPY_BYTES / _best(lambda: into.copy_(source, non_blocking=pinned), device)


def _best(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of several runs, as they would be on a quiet machine."""
    return min(_seconds(work, device) for _ in range(_PROBES))


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    accelerator.wait(device)
    wall, processor = time.perf_counter(), time.process_time()
    work()
    accelerator.wait(device)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    if not accelerator.is_host(device):
        return wall
    # What other programs take away shows in the time that passes, and not in the time of the processor.
    threads = torch.get_num_threads()
    quiet = processor / threads * (_WAITING if threads > 1 else 1)
    return max(min(wall, quiet), 1e-9)


def measure_disk(folder: Path) -> DiskRates | None:
    """Writes 64 MB to a file without a name, waits for the disk, and reads them back; ``None`` if that is not possible.

    The system is asked to forget what it has cached of the file before it is read. It may not do so, and a disk may
    have a cache of its own, so a fast result can be that of memory; a slow one is real.
    """
    block = os.urandom(1 << 20)
    count = _DISK_BYTES // len(block)
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            start = time.perf_counter()
            for _ in range(count):
                file.write(block)
            os.fsync(file.fileno())
            written = time.perf_counter()
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            begin, buffer = time.perf_counter(), bytearray(len(block))
            while file.readinto(buffer):
                pass
            end = time.perf_counter()
    except OSError:
        return None
    return DiskRates(read=_DISK_BYTES / (end - begin), write=_DISK_BYTES / (written - start))
