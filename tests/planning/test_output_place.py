"""A folder that cannot be made is refused with the plan."""

import os
from pathlib import Path

import pytest

from hcsmoe_hub.errors import OutputError
from hcsmoe_hub.planning.output_place import check_place


def refusal(output: Path) -> OutputError:
    with pytest.raises(OutputError) as caught:
        check_place(output)
    assert caught.value.option == "output"
    return caught.value


@pytest.mark.parametrize("name", ["result", "new/and/deep", "räum mit  spaces/模型", "a" * 255, "..", "with\nline"])
def test_a_folder_that_can_be_made_is_accepted(tmp_path: Path, name: str) -> None:
    check_place(tmp_path / name)


def test_a_relative_name_is_looked_up_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to("nowhere")
    check_place(Path("result"))
    assert "link to nowhere" in refusal(Path("link")).message


@pytest.mark.parametrize("name", ["link", "link/below", "link/far/below"])
def test_a_link_that_leads_nowhere_is_named_with_its_target(tmp_path: Path, name: str) -> None:
    (tmp_path / "link").symlink_to("/nonexistent/place")
    assert (
        f"{tmp_path / 'link'} is a link to /nonexistent/place, which does not exist."
        in refusal(tmp_path / name).message
    )


def test_a_link_to_itself_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "link")
    assert "which does not exist" in refusal(tmp_path / "link").message


def test_a_link_to_a_folder_is_that_folder(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    check_place(tmp_path / "link")
    check_place(tmp_path / "link" / "below")


@pytest.mark.parametrize("name", ["a" * 256, "new/" + "ü" * 128, "a" * 300 + "/below"])
def test_a_name_that_is_too_long_is_refused_with_its_length(tmp_path: Path, name: str) -> None:
    longest = max(len(part.encode()) for part in Path(name).parts)
    error = refusal(tmp_path / name)
    assert f"too long: {longest} bytes, where the disk allows 255" in error.message
    assert "shorter" in error.hint


def test_a_name_that_is_not_utf8_is_shown_with_its_bytes(tmp_path: Path) -> None:
    assert "out\\xff, is not UTF-8" in refusal(tmp_path / os.fsdecode(b"out\xff")).message


def test_a_name_with_a_null_character_is_refused(tmp_path: Path) -> None:
    assert "null character" in refusal(tmp_path / "a\0b").message


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is closed to root")
@pytest.mark.parametrize("name", ["", "new", "new/deep"])
def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path, name: str) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    assert f"{closed} cannot be written to." in refusal(closed / name).message
