"""Plants a mistake in a function of the product, for as long as it is needed."""

import inspect
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pkgutil import resolve_name
from types import FunctionType


@contextmanager
def planted(place: str, right: str, wrong: str) -> Iterator[None]:
    """Replaces a piece of a function's source, and keeps its file and lines for tracebacks.

    Args:
        place: ``package.module:function`` or ``package.module:Class.method``.
        right: What is in the source once.
        wrong: What takes its place.
    """
    function = inspect.unwrap(resolve_name(place))
    assert isinstance(function, FunctionType)
    lines, first = inspect.getsourcelines(function)
    source = textwrap.dedent("".join(lines))
    assert source.count(right) == 1, f"{place} does not say {right!r} once"
    code = compile("\n" * (first - 1) + source.replace(right, wrong), inspect.getfile(function), "exec")
    made: dict[str, FunctionType] = {}
    exec(code, function.__globals__, made)
    before, function.__code__ = function.__code__, inspect.unwrap(made[function.__name__]).__code__
    try:
        yield
    finally:
        function.__code__ = before
