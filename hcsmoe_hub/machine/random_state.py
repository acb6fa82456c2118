"""The random generators of a process, which belong to the program that calls."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from hcsmoe_hub.machine import accelerator


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Gives the global generators of Python, NumPy and PyTorch back as they were, those of accelerators included."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(accelerator.count()), device_type=accelerator.KIND):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
