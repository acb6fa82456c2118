"""Sums that a fit is judged by: one copy from the device for all of them, added up over the ranks."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hcsmoe_hub.machine import ranks


def sums_of(parts: Sequence[Sequence[Tensor]], device: torch.device) -> list[float]:
    """Adds up groups of numbers over all ranks.

    Args:
        parts: Groups of float tensors without dimensions on one device; a group may be empty.
        device: That device.

    Returns:
        The sum of each group.
    """
    given = [number for group in parts for number in group]
    numbers = iter(torch.stack(given).tolist() if given else ())
    sums = [sum(next(numbers) for _ in group) for group in parts]
    if not ranks.is_shared():
        return sums
    found: list[float] = ranks.add_up(torch.tensor(sums, dtype=torch.float64, device=device)).tolist()
    return found
