"""The documents of a source with the domain that each record names."""

from collections.abc import Iterator, Sequence
from itertools import chain, islice

from hcsmoe_hub.calibration.conversations import UnreadableError
from hcsmoe_hub.calibration.documents import Document, Row, find_document, is_known, read_document
from hcsmoe_hub.calibration.pairs import NUMBER, Pair, has_column, named_columns, pair_columns, read_pair
from hcsmoe_hub.calibration.rows import read_rows
from hcsmoe_hub.calibration.source_text import OTHER, Item
from hcsmoe_hub.calibration.sources import TextSource
from hcsmoe_hub.errors import CalibrationError

# Column that names the domain of a record.
DOMAIN = "domain"
# Rows that show whether the column of this name holds domains, or something else: addresses of pages, for example.
_PEEKED = 1000
_MOST_DOMAINS = 32
_LONGEST_NAME = 60


def read_items(source: TextSource, *, seed: int, column: str | None, sides: bool = False) -> Iterator[Item]:
    """Domains and documents in shuffled order, without blank documents.

    Args:
        source: Where the text comes from.
        seed: Seed of the shuffle.
        column: Column with the text, ``None`` to find it.
        sides: Whether a row may hold a pair, for a model with an encoder; ``column`` may then be ``SOURCE,TARGET``.

    Yields:
        The name of the domain, empty where the source is one domain, with the document or why the row holds none.

    Raises:
        CalibrationError: If the source cannot be read, or has no text.
    """
    rows = read_rows(source, seed=seed, number=NUMBER if sides else None)
    names: set[str] | None = None
    first = next(rows, None)
    if first is not None:
        rows = chain([first], rows)
        if DOMAIN in first and column != DOMAIN:
            peeked = list(islice(rows, _PEEKED))
            names, rows = _domain_names(peeked), chain(peeked, rows)
    for row in rows:
        domain = "" if names is None else _domain(row, names)
        try:
            pair = _pair(row, source, column) if sides else None
            document = pair or _document(row, source, column)
        except UnreadableError as error:
            yield domain, error
            continue
        if document is not None:
            yield domain, document


def _domain_names(rows: Sequence[Row]) -> set[str] | None:
    """The domains that rows name; ``None`` if what they have in that column are not names of a few domains."""
    names = set[str]()
    for row in rows:
        name = row.get(DOMAIN)
        if name is None:
            continue
        if not isinstance(name, str) or len(name) > _LONGEST_NAME or not name.isprintable():
            return None
        names.add(name.strip())
    names.discard("")
    return names if 0 < len(names) <= _MOST_DOMAINS else None


def _domain(row: Row, names: set[str]) -> str:
    """The domain of a row; rare names that the first rows lack have one in common."""
    name = str(row.get(DOMAIN) or "").strip()
    return name if name in names else OTHER


def _pair(row: Row, source: TextSource, column: str | None) -> Pair | None:
    """The pair of a row in the columns that the user names, or in those that usually hold one; ``None`` without any."""
    named = named_columns(column)
    if named is None:
        columns = pair_columns(row) if column is None else None
        return None if columns is None else read_pair(row, columns)
    for name in named:
        if not has_column(row, name):
            raise _no_column(row, source, name)
    return read_pair(row, named)


def _no_column(row: Row, source: TextSource, name: str) -> CalibrationError:
    return CalibrationError(
        f"{source.text} has no column {name!r}: its columns are {_columns(row)}.",
        hint="name one of them with `text_column`",
    )


def _columns(row: Row) -> str:
    return ", ".join(name for name in row if name != NUMBER)


def _document(row: Row, source: TextSource, column: str | None) -> Document | None:
    """The document of a row; ``None`` if it is blank: different rows may use different columns."""
    if column is None:
        if not is_known(row):
            raise CalibrationError(
                f"{source.text} has no text: its columns are {_columns(row)}.",
                hint="name the column that holds the text with `text_column`",
            )
        return find_document(row)
    if column not in row:
        raise _no_column(row, source, column)
    return read_document(row, column) if row[column] else None
