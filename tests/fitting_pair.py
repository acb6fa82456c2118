"""A layer of a conversion that is fitted twice: by one process, and by two ranks with half of the tokens each."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from hcsmoe_hub import ConvertOptions, convert
from hcsmoe_hub.layer import reducer, refit, router_fit
from hcsmoe_hub.machine import ranks
from hcsmoe_hub.observation.watcher import Observation


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What both fits have come to on one rank.

    Attributes:
        alone: Report of the fit by one process.
        shared: Report of the fit by two ranks.
        moved: How far the former moved each tensor, by name.
        apart: How far the latter's is from it, by name.
    """

    alone: Any
    shared: Any
    moved: dict[str, float]
    apart: dict[str, float]


class _Done(Exception):
    """Ends a conversion once its first layer is fitted."""

    def __init__(self, found: Comparison) -> None:
        super().__init__()
        self.found = found


@contextmanager
def _alone() -> Iterator[None]:
    """Lets this rank be a process of its own inside a ``with`` block."""
    is_shared = ranks.is_shared
    ranks.is_shared = lambda: False
    try:
        yield
    finally:
        ranks.is_shared = is_shared


def _half(seen: Observation, rank: int) -> Observation:
    """What a rank would have seen: its part of the micro-batches, and the domains of all sequences."""
    part = slice(rank * len(seen.outputs) // 2, (rank + 1) * len(seen.outputs) // 2)
    return replace(seen, calls=seen.calls[part], outputs=seen.outputs[part], top_k=seen.top_k[part])


def _compare(fit: Callable[..., Any], half: Callable[..., Any], start: Mapping[str, Tensor]) -> Comparison:
    """Fits copies of some tensors.

    Args:
        fit: Fits all tokens, given tensors.
        half: Fits those of this rank.
        start: The tensors.
    """
    one, other = ({name: tensor.clone() for name, tensor in start.items()} for _ in range(2))
    with _alone():
        alone = fit(one)
    return Comparison(
        alone=alone,
        shared=half(other),
        moved={name: float((one[name] - tensor).float().norm()) for name, tensor in start.items()},
        apart={name: float((other[name] - one[name]).float().norm()) for name in start},
    )


def fit_twice(source: str, wanted: ConvertOptions, listener: Callable[..., None]) -> Comparison:
    """Fits the first layer of a conversion on each rank alone, and on both together.

    Args:
        source: The checkpoint.
        wanted: Options; the output folder gets the number of the rank.
        listener: Of events.
    """
    rank, is_shared = ranks.number(), ranks.is_shared
    refit_layer, fit_router = refit.refit_layer, router_fit.RouterFitter.fit

    def refit_both(layer: Any, changed: Mapping[str, Tensor], *, seen: Observation, **others: Any) -> None:
        one, other = (partial(refit_layer, layer, seen=part, **others) for part in (seen, _half(seen, rank)))
        with _together(is_shared):
            raise _Done(_compare(one, other, changed))

    def fit_both(fitter: router_fit.RouterFitter, changed: dict[str, Tensor]) -> None:
        half = _half(fitter._seen, rank)
        with _together(is_shared):
            other = router_fit.RouterFitter(fitter._layer, fitter._clusters, seen=half, fitted=half)
            raise _Done(_compare(partial(fit_router, fitter), partial(fit_router, other), changed))

    reducer.refit_layer = refit_both  # type: ignore[assignment]
    router_fit.RouterFitter.fit = fit_both  # type: ignore[assignment,method-assign]
    try:
        with _alone():
            convert(source, replace(wanted, output=wanted.output.with_name(f"rank{rank}")), listener=listener)
    except _Done as done:
        return done.found
    finally:
        reducer.refit_layer = refit_layer
        router_fit.RouterFitter.fit = fit_router  # type: ignore[method-assign]
    raise AssertionError("nothing was fitted")


@contextmanager
def _together(is_shared: Callable[[], bool]) -> Iterator[None]:
    """Lets this rank be one of two again inside a ``with`` block."""
    own = ranks.is_shared
    ranks.is_shared = is_shared
    try:
        yield
    finally:
        ranks.is_shared = own
