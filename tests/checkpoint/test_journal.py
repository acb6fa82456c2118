"""A journal counts complete lines only, and a state file is read only if it is what was written."""

from pathlib import Path

import pytest
import torch

from hcsmoe_hub.checkpoint.journal import Journal
from hcsmoe_hub.checkpoint.state_file import read_state, write_state
from hcsmoe_hub.machine.transfer import Download


@pytest.mark.parametrize("torn", [b'{"step": "conv', b'{"step": "convert"}', b"\0" * 40 + b"\n", b"[1]\n"])
def test_what_is_not_a_complete_line_is_ignored_and_written_over(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "progress" / "journal.jsonl"
    Journal(path).append({"step": "convert", "layer": 0})
    with path.open("ab") as file:
        file.write(torn)
    journal = Journal(path)
    assert journal.lines == [{"step": "convert", "layer": 0}]
    journal.append({"step": "convert", "layer": 1})
    assert [line["layer"] for line in Journal(path).lines] == [0, 1]


def test_a_state_file_is_nothing_where_it_is_lost_or_changed(tmp_path: Path) -> None:
    download, path = Download(torch.device("cpu")), tmp_path / "states"
    values = torch.arange(6, dtype=torch.bfloat16).view(2, 3)
    digest = write_state(path, {"is_apart": True}, {"0": download.mark(values)}, download)
    found = read_state(path, digest)
    assert found is not None
    assert found.content == {"is_apart": True}
    assert torch.equal(found.tensors["0"], values)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert read_state(path, digest) is None
    path.unlink()
    assert read_state(path, digest) is None
