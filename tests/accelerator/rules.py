"""The rules of the pretended accelerator: what it refuses, what it takes, what it waits for, and what it counts."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from pretended import CAPACITY, NAME, Counts
from torch import Tensor


class Rules:
    """Operands on both sides, and the rules about them."""

    def __init__(self, device: Any) -> None:
        self.device = device
        self.place = torch.device(NAME, 0)
        self.host_NH = torch.arange(12.0).view(3, 4)
        self.ours_NH = self.host_NH.to(self.place)
        self.rows = torch.tensor([0, 2])
        self.our_rows = self.rows.to(self.place)
        self.square_HH = torch.eye(4).to(self.place) * 2

    def refused(self) -> Mapping[str, Callable[[], Any]]:
        """What has operands on both sides where CUDA takes none."""
        host, ours, rows, our_rows, square = self.host_NH, self.ours_NH, self.rows, self.our_rows, self.square_HH
        return {
            "sum": lambda: ours + host,
            "sum, host first": lambda: host + ours,
            "product": lambda: ours @ host.T,
            "product with a number": lambda: torch.mm(ours, torch.tensor(2.0)),
            "in place, on the host": lambda: host.clone().add_(ours),
            "a number of the device into one of the host": lambda: torch.zeros(3)[0].add_(ours.sum()),
            "host, indexed by the device": lambda: host[our_rows],
            "host values, put into the device": lambda: ours.clone().__setitem__(our_rows, torch.zeros(2, 4)),
            "rows added by a host index": lambda: ours.clone().index_add_(0, rows, ours[:2]),
            "rows selected by a host index": lambda: ours.index_select(0, rows),
            "gather": lambda: ours.gather(1, torch.zeros(3, 1, dtype=torch.long)),
            "concatenation": lambda: torch.cat([ours, host]),
            "stack": lambda: torch.stack([host, ours]),
            "choice": lambda: torch.where(host > 0, ours, 0),
            "linear": lambda: F.linear(ours, square.cpu()),
            "embedding": lambda: F.embedding(rows, ours),
            "membership": lambda: torch.isin(our_rows, rows),
            "grouped product": lambda: torch._grouped_mm(ours, square[None], offs=torch.tensor([3], dtype=torch.int32)),
            "result on the host": lambda: torch.add(ours, ours, out=torch.empty(3, 4)),
            "numpy": lambda: ours.numpy(),
        }

    def taken(self) -> Mapping[str, Callable[[], Any]]:
        """What CUDA takes; a tensor that is returned has to be that of the host."""
        host, ours, rows, our_rows, square = self.host_NH, self.ours_NH, self.rows, self.our_rows, self.square_HH
        return {
            "number of the host": lambda: (ours + torch.tensor(2.0), host + 2.0),
            "number of the host first": lambda: (torch.tensor(2.0) * ours, host * 2.0),
            "whole quotient by a number": lambda: (ours // 2, host // 2),
            "index of the host": lambda: (ours[rows], host[rows]),
            "mask of the host": lambda: (ours[torch.tensor([True, False, True])], host[rows]),
            "number put by an index of the host": lambda: (self._put(ours, rows), self._put(host, rows)),
            "copy to the host": lambda: (host.clone().copy_(ours), host),
            "views": lambda: (ours.T.reshape(2, 6)[1:].unfold(1, 2, 2), host.T.reshape(2, 6)[1:].unfold(1, 2, 2)),
            "change of a view": lambda: (self._changed(ours), self._changed(host)),
            "complex numbers": lambda: (self._complex(ours), self._complex(host)),
            "fp8": lambda: (ours.to(torch.float8_e4m3fn).float(), host.to(torch.float8_e4m3fn).float()),
            "Cholesky factor": lambda: (
                torch.linalg.cholesky(square.double()),
                torch.linalg.cholesky(square.cpu().double()),
            ),
            "sort": lambda: (ours.sort(dim=1, descending=True)[1], host.sort(dim=1, descending=True)[1]),
            "counts": lambda: (torch.bincount(our_rows, minlength=4), torch.bincount(rows, minlength=4)),
            "histogram": lambda: (torch.histc(our_rows, 3, 0, 2), torch.tensor([1, 0, 1])),
            "attention": lambda: (self._attention(ours), self._attention(host)),
            "convolution": lambda: (self._convolution(ours), self._convolution(host)),
            "grouped product": lambda: (self._grouped(ours, square), ours.cpu() * 2),
            "product with a wider result": lambda: (
                torch.mm(ours.bfloat16(), square.bfloat16(), out_dtype=torch.float32),
                host * 2,
            ),
            "training": lambda: (self._trained(square), self._trained(square.cpu())),
            "no rows": lambda: (torch.zeros(3, 0, device=self.place), host[:, :0]),
            "result that grows": lambda: (torch.add(ours, 1, out=torch.empty(0, device=self.place)), host + 1),
        }

    @staticmethod
    def _put(values: Tensor, rows: Tensor) -> Tensor:
        values = values.clone()
        values[rows] = torch.tensor(5.0)
        return values

    @staticmethod
    def _changed(values: Tensor) -> Tensor:
        values = values.clone()
        values[1:, :2].mul_(3).add_(values[0, 0])
        return values

    @staticmethod
    def _complex(values: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(values.reshape(3, 2, 2)) * 2j)

    @staticmethod
    def _attention(values: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(values[None], values[None], values[None], is_causal=True)

    @staticmethod
    def _convolution(values: Tensor) -> Tensor:
        return F.conv1d(values[None], torch.ones(3, 1, 2).to(values.device), groups=3)

    @staticmethod
    def _factor(square: Tensor) -> Tensor:
        return torch.linalg.cholesky(square.double())

    @staticmethod
    def _wide(values: Tensor, square: Tensor) -> Tensor:
        return torch.mm(values.bfloat16(), square.bfloat16(), out_dtype=torch.float32)

    @staticmethod
    def _grouped(values: Tensor, square: Tensor) -> Tensor:
        ends = torch.tensor([1, 3], dtype=torch.int32).to(values.device)
        return torch._grouped_mm(values, torch.stack([square, square]), offs=ends)

    @staticmethod
    def _trained(square: Tensor) -> Tensor:
        weight = square.clone().requires_grad_()
        optimizer = torch.optim.Adam([weight])
        (weight.to("cpu").to(square.device) @ square).square().sum().backward()
        optimizer.step()
        return weight.detach()

    def waits(self) -> Mapping[str, tuple[int, Callable[[], Any]]]:
        """How often CUDA waits for an operation."""
        ours, our_rows = self.ours_NH, self.our_rows
        pinned, our_repeats = torch.ones(3, 4).pin_memory(), torch.tensor([2, 2, 2]).to(self.place)
        unpinned = torch.ones(3, 4)
        return {
            "a product": (0, lambda: ours @ ours.T),
            "a number that is read": (1, lambda: float(ours.sum())),
            "a truth": (1, lambda: bool((ours > 0).all())),
            "positions": (1, lambda: torch.where(ours > 0)),
            "a mask": (1, lambda: ours[ours > 0]),
            "counts": (1, lambda: torch.bincount(our_rows)),
            "a copy to the host": (1, lambda: ours.cpu()),
            "a copy to the device": (1, lambda: self.host_NH.to(self.place)),
            "a copy from pinned memory that does not block": (0, lambda: pinned.to(self.place, non_blocking=True)),
            "a copy from other memory that does not block": (1, lambda: self.host_NH.to(self.place, non_blocking=True)),
            "a copy into pinned memory that does not block": (0, lambda: pinned.copy_(ours, non_blocking=True)),
            "a copy into other memory that does not block": (
                1,
                lambda: unpinned.copy_(ours, non_blocking=True),
            ),
            "repeats of unknown length": (1, lambda: torch.repeat_interleave(ours, our_repeats, dim=0)),
            "repeats of known length": (
                0,
                lambda: torch.repeat_interleave(ours, our_repeats, dim=0, output_size=6),
            ),
            "an event": (1, lambda: self._event().synchronize()),
            "a stream": (1, lambda: torch.get_device_module(NAME).current_stream().synchronize()),
        }

    @staticmethod
    def _event() -> Any:
        event = torch.get_device_module(NAME).Event()
        event.record()
        return event

    def broken(self) -> list[str]:
        """The rules that do not hold."""
        found = []
        for name, run in self.refused().items():
            try:
                run()
            except (RuntimeError, TypeError):
                continue
            found.append(f"refused: {name}")
        for name, run in self.taken().items():
            ours, host = run()
            if not torch.equal(ours.cpu(), host.cpu()):
                found.append(f"taken: {name}")
        for name, (count, run) in self.waits().items():
            with Counts(self.device) as counts:
                run()
            if counts.waits != count:
                found.append(f"waits: {name}: {counts.waits} instead of {count}")
        return found + [
            f"{rule.__name__}" for rule in (self._memory, self._failure, self._early, self._late) if not rule()
        ]

    def _memory(self) -> bool:
        """The peak is that of the tensors that are there at once, and the capacity is what they may take."""
        self.device.reset(True)
        before = self.device.memory()["used"]
        ours = torch.zeros(1000, device=self.place) + torch.ones(1000, device=self.place)
        memory = self.device.memory()
        self.device.limit(memory["used"] + 4096)
        try:
            torch.zeros(1025, device=self.place)
            is_refused = False
        except torch.OutOfMemoryError:
            is_refused = True
        self.device.limit(CAPACITY)
        return (
            is_refused
            and memory["used"] - before == 4096
            and memory["peak"] - before == 3 * 4096
            and ours.numel() == 1000
        )

    def _failure(self) -> bool:
        """The allocation that is asked to fail does, and no other."""
        self.device.reset(True)
        self.device.fail_at(2)
        found = []
        for _ in range(3):
            try:
                torch.empty(8, device=self.place)
                found.append(True)
            except torch.OutOfMemoryError:
                found.append(False)
        self.device.fail_at(0)
        return found == [True, False, True]

    def _early(self) -> bool:
        """Who reads a copy to the host without waiting for it reads no numbers."""
        pinned = torch.zeros(3, 4).pin_memory()
        pinned.copy_(self.ours_NH, non_blocking=True)
        was_early = bool(pinned.isnan().all())
        self._event().synchronize()
        return was_early and torch.equal(pinned, self.host_NH)

    def _late(self) -> bool:
        """Who changes what is on its way to the device changes what arrives; another stream has to wait for it."""
        module = torch.get_device_module(NAME)
        pinned, stream = torch.ones(4).pin_memory(), module.Stream()
        with module.stream(stream):
            ours = pinned.to(self.place, non_blocking=True)
        without_waiting = ours.clone()
        pinned.fill_(7)
        module.current_stream().wait_stream(stream)
        return bool(without_waiting.isnan().all()) and ours.tolist() == [7.0] * 4
