"""What the sink writes, for each kind of reader."""

import io
import json

import pytest
from rich.table import Table

from hcsmoe_hub.cli.output import Output


@pytest.fixture
def stdout(monkeypatch):
    """Puts a stream of the given encoding in place of stdout, and reads it back."""

    def install(encoding):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr("sys.stdout", stream)
        return lambda: stream.buffer.getvalue().decode(encoding)

    return install


@pytest.mark.parametrize(("encoding", "sign"), [("utf-8", "✓"), ("ascii", "OK")])
def test_check_mark_is_what_the_terminal_can_show(stdout, encoding, sign):
    stdout(encoding)
    assert Output().check_mark == sign


def test_document_is_the_same_in_every_encoding(stdout):
    read = stdout("ascii")
    Output(as_json=True).result({"path": "modèle"}, human="")
    assert json.loads(read()) == {"path": "modèle"}


def test_values_are_never_read_as_markup(stdout):
    read = stdout("utf-8")
    Output().result(None, human="a [red]folder[/red] :smile:")
    assert read() == "a [red]folder[/red] :smile:\n"


def test_lines_for_other_programs_are_neither_wrapped_nor_padded(stdout):
    read = stdout("utf-8")
    table = Table.grid()
    table.add_row("word " * 100)
    table.add_row("word")
    Output().result(None, human=table)
    assert read() == ("word " * 100).rstrip() + "\nword\n"


def test_hints_are_for_people_alone(capsys):
    for output in (Output(as_json=True), Output(quiet=True)):
        output.hint("try this")
    assert capsys.readouterr().err == ""
    Output().hint("try this")
    assert capsys.readouterr().err == "Hint: try this\n"


def test_drawings_for_other_programs_are_as_wide_as_a_page(stdout):
    stdout("utf-8")
    assert Output().drawing_width == 100
