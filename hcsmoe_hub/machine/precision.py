"""How exactly an accelerator multiplies float32 matrices."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hcsmoe_hub.machine.accelerator import is_host


@contextmanager
def fast_products(device: torch.device) -> Iterator[None]:
    """Lets an accelerator round the factors of float32 products to TF32 inside a ``with`` block; sums stay float32.

    For fits, whose results are judged on text that they have not seen. The host's products stay what they are.

    Args:
        device: Where the products are computed.
    """
    with _precision(device, "tf32"):
        yield


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Keeps the factors of float32 products as they are inside a ``with`` block, for sums that equations are solved by.

    Args:
        device: Where the products are computed.
    """
    with _precision(device, "ieee"):
        yield


@contextmanager
def _precision(device: torch.device, name: str) -> Iterator[None]:
    if is_host(device):
        yield
        return
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    products.fp32_precision = name
    try:
        yield
    finally:
        products.fp32_precision = before
