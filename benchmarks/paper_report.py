"""Markdown of the papers' tables: measured figures next to published ones, and blocks of the documentation page."""

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence

from paper_commands import Commands
from paper_data import Conversion, Data, Row, Table
from paper_runs import Accuracy
from quality_tables import table as markdown

# Lines of the page between which a block is generated.
BLOCK = re.compile(r"(<!-- (\S+) -->\n).*?(<!-- end -->\n)", re.DOTALL)
NOT_RUN = "not-run"


def share(value: float) -> str:
    """An accuracy as the papers print it."""
    return f"{value:.4f}".removeprefix("0")


def label(row: Row) -> str:
    """Number of experts and method."""
    return f"{row.experts}, {row.method}"


def columns(data: Data, table: Table) -> list[str]:
    """Titles of the tasks of a table, and of their mean."""
    return [*(data.columns[task] for task in data.tasks[table.tasks]), "mean"]


def published(data: Data, table: Table) -> str:
    """A table as it is in the paper."""
    rows = [[label(row), *map(share, row.published), share(row.average)] for row in table.rows]
    return markdown(["experts, method", *columns(data, table)], rows)


def compared(data: Data, table: Table, measured: Mapping[Row, tuple[Sequence[Accuracy], float | None]]) -> str:
    """Measured accuracies in percent with their standard errors, and in brackets the difference to the paper in points.

    Args:
        data: The data file.
        table: The table.
        measured: For each row the accuracies of the tasks and their mean, and the ratio of perplexities on held-out
            calibration text if it was measured.
    """
    rows = []
    for row, (found, ratio) in measured.items():
        pairs = zip(found, (*row.published, row.average), strict=True)
        cells = [difference(accuracy, value) for accuracy, value in pairs]
        rows.append([label(row), *cells, "" if ratio is None else f"{ratio:.2f}"])
    return markdown(["experts, method", *columns(data, table), "perplexity ratio"], rows)


def difference(found: Accuracy, value: float) -> str:
    """An accuracy with its standard error, and its difference to a published one."""
    error = "" if found.error is None else f" ±{100 * found.error:.1f}"
    return f"{100 * found.value:.1f}{error} ({100 * (found.value - value):+.1f})"


def command(words: Iterable[str]) -> str:
    """A command line."""
    return shlex.join(["hcsmoe", *words])


def lines(commands: Commands, table: Table, known: set[Conversion]) -> Iterator[str]:
    """Commands of a table: its source, then every conversion that is not known yet. They are known afterwards."""
    for row in table.rows:
        conversion = table.conversion(row)
        if conversion not in known and row.recipe is None:
            yield command(commands.evaluate(conversion, "hc-smoe"))
        elif conversion not in known:
            yield command(commands.convert(conversion))
        known.add(conversion)


def blocks(data: Data) -> dict[str, str]:
    """Generated parts of the documentation page, by their names."""
    commands, known, found = Commands(data=data), set[Conversion](), dict[str, str]()
    for table in data.tables:
        code = "\n".join(lines(commands, table, known))
        # As text: a hundred conversions would take the tests of the pages too long, and those of the tables plan them.
        shell = f"```text\n{code}\n```\n\n" if code else ""
        found[table.name] = f"{shell}{published(data, table)}\n"
    rows = [
        [f"{'HC-SMoE' if each['paper'] == 'hc-smoe' else 'M-SMoE'}, {each['tables']}", each["reason"]]
        for each in data.not_run
    ]
    found[NOT_RUN] = f"{markdown(['tables', 'why'], rows)}\n"
    return found


def filled(page: str, data: Data) -> str:
    """The page with its blocks as the data file has them.

    Raises:
        KeyError: If the page has a block that does not exist.
    """
    parts = blocks(data)
    return BLOCK.sub(lambda found: f"{found[1]}\n{parts[found[2]]}\n{found[3]}", page)
