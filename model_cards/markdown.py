"""Pieces of Markdown, and numbers as a card shows them."""

from collections.abc import Iterable, Mapping, Sequence

# Longer commands get a line per option.
LINE = 96


def cell(text: str) -> str:
    """A text for a table: neither a bar nor a line break of it may end the cell."""
    return " ".join(text.split()).replace("|", "\\|")


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, the first column to the left and the others to the right."""
    rules = ["---", *["---:"] * (len(titles) - 1)]
    return "\n".join("| " + " | ".join(map(cell, row)) + " |" for row in (titles, rules, *rows))


def fence(language: str, *lines: str) -> str:
    """A block of code."""
    return "\n".join((f"```{language}", *lines, "```"))


def bullets(items: Iterable[str]) -> str:
    """A list."""
    return "\n".join(f"- {item}" for item in items)


def folded(title: str, content: str) -> str:
    """Content that is shown on request."""
    return f"<details>\n<summary>{title}</summary>\n\n{content}\n\n</details>"


def shell(*words: str) -> str:
    """A command; one option per line if it is long.

    Args:
        words: The command and its arguments, then options, each with its value: ``--experts 4``.
    """
    line = " ".join(words)
    if len(line) <= LINE:
        return line
    head = [word for word in words if not word.startswith("-")]
    options = [word for word in words if word.startswith("-")]
    return " \\\n  ".join((" ".join(head), *options))


def percent(share: float) -> str:
    """A share: ``87.1 %``."""
    return f"{100 * share:.1f} %"


def with_error(share: float, error: float | None) -> str:
    """A share with its standard error: ``87.1 ± 1.2 %``."""
    return percent(share) if error is None else f"{100 * share:.1f} ± {100 * error:.1f} %"


def with_change(shown: str, change: Mapping[str, int]) -> str:
    """How something is after a change, and by how much it changed: ``1.90 M (-38.3 %)``."""
    percents = f"{100 * (change['after'] / change['before'] - 1):+.1f}"
    return shown if float(percents) == 0 else f"{shown} ({percents} %)"


def ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers as ``0-3,7``."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][-1] + 1:
            spans[-1] = [spans[-1][0], number]
        else:
            spans.append([number])
    return ",".join("-".join(map(str, span)) for span in spans)


def span(numbers: Sequence[int]) -> str:
    """The least and the greatest number: ``3 to 5``, or ``4`` if they are the same."""
    least, greatest = min(numbers), max(numbers)
    return str(least) if least == greatest else f"{least} to {greatest}"


def joined(items: Sequence[str], last: str = "and") -> str:
    """``a, b and c``."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {last} {items[-1]}"


def plural(number: int, noun: str) -> str:
    """``1 layer``, ``2 layers``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
