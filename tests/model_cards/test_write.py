"""Writing a card over an earlier one, and refusing where something would be lost."""

import json
from pathlib import Path
from typing import Any

import pytest

from hcsmoe_hub.errors import OutputError, PlanError, SourceError
from hcsmoe_hub.model_cards import write_card

KEEP, END = "<!-- hcsmoe:keep -->", "<!-- /hcsmoe:keep -->"


def insert(folder: Path, text: str) -> None:
    """Writes between the markers of a card, as a person would."""
    path = folder / "README.md"
    before, after = path.read_text("utf-8").split(KEEP)
    path.write_text(f"{before}{KEEP}\n{text}\n{END}{after.split(END)[1]}", "utf-8")


def test_writing_twice_changes_nothing(make_folder: Any) -> None:
    folder = make_folder()
    first = write_card(folder).path.read_bytes()
    assert write_card(folder).path.read_bytes() == first


def test_a_section_between_markers_stays(make_folder: Any) -> None:
    folder = make_folder()
    write_card(folder)
    insert(folder, "## My notes\n\nUse it for **tests**.")
    written = write_card(folder, "me/renamed")
    text = written.path.read_text("utf-8")
    assert f"{KEEP}\n## My notes\n\nUse it for **tests**.\n{END}" in text
    assert "# renamed" in text
    assert written.kept_sections == 1


def test_every_section_stays_in_order(make_folder: Any) -> None:
    folder = make_folder()
    write_card(folder)
    insert(folder, f"one\n{END}\n\n{KEEP}\ntwo")
    text = write_card(folder).path.read_text("utf-8")
    assert text.index("one") < text.index("two")
    assert (text.count(KEEP), text.count(END)) == (2, 2)


def test_a_section_survives_overwriting_a_foreign_card(make_folder: Any) -> None:
    folder = make_folder()
    (folder / "README.md").write_text(f"# Mine\n\n{KEEP}\nprecious\n{END}\n", "utf-8")
    text = write_card(folder, overwrite=True).path.read_text("utf-8")
    assert "precious" in text
    assert "# Mine" not in text


def test_a_foreign_card_is_not_overwritten(make_folder: Any) -> None:
    folder = make_folder()
    (folder / "README.md").write_text("# Mine\n", "utf-8")
    with pytest.raises(OutputError, match="was not written by hcsmoe"):
        write_card(folder)
    assert (folder / "README.md").read_text("utf-8") == "# Mine\n"


@pytest.mark.parametrize(("old", "new"), [("No training was done.", "Trained."), ("- moe\n", "- moe\n- mine\n")])
def test_a_card_that_was_changed_is_not_overwritten(make_folder: Any, old: str, new: str) -> None:
    folder = make_folder()
    path = write_card(folder).path
    path.write_text(path.read_text("utf-8").replace(old, new, 1), "utf-8")
    with pytest.raises(OutputError, match="was edited after hcsmoe wrote it"):
        write_card(folder)
    assert new not in write_card(folder, overwrite=True).path.read_text("utf-8")


def test_line_ends_of_another_system_are_no_change(make_folder: Any) -> None:
    folder = make_folder()
    path = write_card(folder).path
    first = path.read_bytes()
    path.write_bytes(b"\xef\xbb\xbf" + first.replace(b"\n", b"\r\n"))
    assert write_card(folder).path.read_bytes() == first


@pytest.mark.parametrize("damage", [(KEEP, ""), (END, ""), (KEEP, f"{KEEP}{KEEP}")])
def test_half_a_marker_is_refused(make_folder: Any, damage: tuple[str, str]) -> None:
    folder = make_folder()
    path = write_card(folder).path
    path.write_text(path.read_text("utf-8").replace(*damage), "utf-8")
    with pytest.raises(OutputError, match="without its other half"):
        write_card(folder, overwrite=True)


def test_the_repository_is_remembered(make_folder: Any) -> None:
    folder = make_folder()
    write_card(folder, "me/result")
    again = write_card(folder)
    assert again.repo_id == "me/result"
    assert "vllm serve me/result" in again.path.read_text("utf-8")


@pytest.mark.parametrize("repo_id", ["a/b/c", "bad name", "-x/y", ""])
def test_a_name_that_is_not_a_repository_is_refused(make_folder: Any, repo_id: str) -> None:
    with pytest.raises(PlanError, match="not the name of a repository"):
        write_card(make_folder(), repo_id)


def test_a_gate_and_a_missing_licence_are_warned_of(make_folder: Any) -> None:
    written = write_card(make_folder(source={"repo_id": "a/b", "revision": None, "license": None, "gated": True}))
    assert [warning.split(";")[0] for warning in written.warnings] == ["no licence of a/b is known", "a/b is gated"]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ({"schema_version": 3}, "has schema version 3, and this version of hcsmoe reads 1 to 2"),
        ({"layers": []}, "layers is empty"),
        ({"layers": [3]}, r"layers\[0\] is 3, not an object"),
        ({"parameters": {"before": 1, "after": None}}, "parameters.after is null, not an integer"),
        ({"experts": {"before": True}}, "experts.before is true, not an integer"),
        ({"method": {"method": "magic"}}, "the method 'magic', which this version of hcsmoe does not know"),
        ({"versions": "none"}, 'versions is "none", not an object'),
    ],
)
def test_damaged_reports_are_refused(make_folder: Any, damage: Any, reason: str) -> None:
    with pytest.raises(SourceError, match=reason):
        write_card(make_folder(damage))


@pytest.mark.parametrize("name", ["hcsmoe.json", "config.json"])
def test_a_folder_without_a_conversion_is_refused(make_folder: Any, name: str) -> None:
    folder = make_folder()
    (folder / name).unlink()
    with pytest.raises(SourceError, match=f"has no {name}"):
        write_card(folder)


@pytest.mark.parametrize("content", ["[]", "{", "\ud800"])
def test_what_is_not_an_object_is_refused(make_folder: Any, content: str) -> None:
    folder = make_folder()
    (folder / "hcsmoe.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(SourceError, match="is damaged"):
        write_card(folder)


def test_a_missing_value_is_named(make_folder: Any, report: Any) -> None:
    folder = make_folder()
    document = json.loads((folder / "hcsmoe.json").read_text("utf-8"))
    del document["experts"]["moe_layers"]
    (folder / "hcsmoe.json").write_text(json.dumps(document), "utf-8")
    with pytest.raises(SourceError, match=r"experts\.moe_layers is missing"):
        write_card(folder)
