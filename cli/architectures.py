"""``hcsmoe architectures``: the model types that are supported, the widths of experts, and how routers choose."""

from collections.abc import Iterable

from rich.table import Table
from rich.text import Text

from hcsmoe_hub.cli import options as cli
from hcsmoe_hub.cli.output import Output
from hcsmoe_hub.cli.tables import Document
from hcsmoe_hub.model.architectures import FAMILIES


def architectures(as_json: cli.JsonOption = False) -> None:
    """List the model types that can be converted, and why others cannot."""
    document = [
        {
            "model_type": family.model_type,
            "text_type": family.text_type or None,
            "example": family.example,
            "supported": not family.refusal,
            "width": family.width or None,
            "router": family.router,
            "note": family.note or None,
            "refusal": family.refusal or None,
        }
        for family in FAMILIES
    ]
    sink = Output(as_json=as_json)
    sink.result(document, human=_table(document))


def _table(document: Iterable[Document]) -> Table:
    """The table of model types."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("MODEL TYPE", no_wrap=True)
    table.add_column("SUPPORTED")
    table.add_column("WIDTH")
    table.add_column("EXAMPLE", no_wrap=True)
    table.add_column("ROUTER", ratio=3)
    table.add_column("NOTE", ratio=3)
    for row in document:
        supported = Text("yes", style="green") if row["supported"] else Text("no", style="red")
        width = row["width"] or "fixed"
        why = row["refusal"] or row["note"]
        table.add_row(row["model_type"], supported, width, row["example"], row["router"], why)
    return table
