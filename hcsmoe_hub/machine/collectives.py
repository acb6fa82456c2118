"""Sums and rows of all ranks, wherever each of them holds its own.

Where memory has run out on one rank, it may hold on the host what others hold on their accelerators. A collective of
both would never end, so ranks always meet in one kind of memory: that of the accelerators if these talk over a library
of their own, such as NCCL, and the host's otherwise.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from hcsmoe_hub.machine import accelerator

# Bytes that are exchanged at once, so that there is room for them wherever ranks meet.
PIECE_BYTES = 64 << 20


def meeting_place() -> torch.device:
    """The device on which ranks meet; every rank of a process group has one of the same kind."""
    backends = dict(pair.split(":") for pair in dist.get_backend_config().split(","))
    if backends.get(accelerator.KIND, "gloo") == "gloo":
        return accelerator.HOST
    return torch.device(accelerator.KIND, torch.get_device_module(accelerator.KIND).current_device())


def add_up(values: Tensor) -> None:
    """Turns a tensor into its sum over all ranks."""
    place, whole = meeting_place(), values.contiguous()
    for part in whole.view(-1).split(max(1, PIECE_BYTES // values.element_size())):
        sent = part.to(place)
        dist.all_reduce(sent)
        if sent is not part:
            part.copy_(sent)
    if whole is not values:
        values.copy_(whole)


def gather(content: Tensor) -> list[Tensor]:
    """The bytes of all ranks, equally many of each, on the device of this rank's.

    Args:
        content: uint8 of one dimension.
    """
    place = meeting_place()
    found = [torch.empty_like(content) for _ in range(dist.get_world_size())]
    for start in range(0, len(content), PIECE_BYTES):
        sent = content[start : start + PIECE_BYTES].to(place)
        received = [torch.empty_like(sent) for _ in found]
        dist.all_gather(received, sent)
        for whole, part in zip(found, received, strict=True):
            whole[start : start + PIECE_BYTES].copy_(part)
    return found


def copy_from_first(values: Tensor) -> None:
    """Turns a tensor into that of the first rank."""
    place, whole = meeting_place(), values.contiguous()
    for part in whole.view(-1).view(torch.uint8).split(PIECE_BYTES):
        sent = part.to(place)
        dist.broadcast(sent, src=0)
        if sent is not part:
            part.copy_(sent)
    if whole is not values:
        values.copy_(whole)
