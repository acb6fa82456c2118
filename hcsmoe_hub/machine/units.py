"""Sizes and counts for people, in decimal units as on the Hub."""

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
