"""Numbers and lists as people read them: decimal units as on the Hub, percents, ranges, plurals."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

BYTE_UNITS = ("KB", "MB", "GB", "TB")
COUNT_UNITS = ("K", "M", "B", "T")


def _scaled(number: float, units: tuple[str, ...], *, digits: int) -> str:
    for unit in units[:-1]:
        number /= 1000
        # Compared as it will be shown: 999.96 must not become "1000.0".
        if round(number, digits) < 1000:
            return f"{number:.{digits}f} {unit}"
    return f"{number / 1000:.{digits}f} {units[-1]}"


def format_bytes(number: int) -> str:
    """Bytes: ``93.4 GB``."""
    return f"{number} B" if number < 1000 else _scaled(number, BYTE_UNITS, digits=1)


def format_count(number: int) -> str:
    """A count in short: ``46.70 B``."""
    return str(number) if number < 1000 else _scaled(number, COUNT_UNITS, digits=2)


def format_seconds(seconds: float) -> str:
    """A duration in its two largest units: ``6 min 40 s``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def format_percent(share: float, error: float | None = None) -> str:
    """A share, with its standard error if it has one: ``87.1 %``, ``87.1 ± 1.2 %``."""
    return f"{100 * share:.1f} %" if error is None else f"{100 * share:.1f} ± {100 * error:.1f} %"


def format_change(change: Mapping[str, int]) -> str:
    """How much less (or more) ``after`` is than ``before``: ``-48.3 %``; empty where that rounds to nothing."""
    percents = f"{100 * (change['after'] / change['before'] - 1):+.1f}"
    return "" if float(percents) == 0 else f"{percents} %"


def format_mean(values: Iterable[float | None], *, digits: int = 3) -> str:
    """Mean of the values that are defined; a dash if there are none."""
    defined = [value for value in values if value is not None]
    return f"{fmean(defined):.{digits}f}" if defined else "-"


def format_plural(number: int, noun: str) -> str:
    """A number with its noun: ``1 shard``, ``2 shards``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def format_range(numbers: Iterable[int]) -> str:
    """The least and the greatest of several numbers, ``3 to 5``; ``4`` if they are all the same."""
    found = list(numbers)
    least, greatest = min(found), max(found)
    return str(least) if least == greatest else f"{least} to {greatest}"


def format_numbers(numbers: Iterable[int]) -> str:
    """Ascending numbers as a list of ranges: ``0-3,7``."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][-1] + 1:
            spans[-1] = [spans[-1][0], number]
        else:
            spans.append([number])
    return ",".join("-".join(map(str, span)) for span in spans)


def format_list(items: Sequence[str], last: str = "and") -> str:
    """Several items as a sentence names them: ``a, b and c``."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {last} {items[-1]}"
