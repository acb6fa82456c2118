"""What a user passes as a source: a folder, an id, or something that is neither."""

from pathlib import Path

import pytest

from hcsmoe_hub.errors import SourceError
from hcsmoe_hub.hub.open import open_source


def test_a_file_instead_of_a_folder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.touch()
    with pytest.raises(SourceError) as caught:
        open_source(str(path))
    assert caught.value.message == f"{path} is a file."
    assert "folder" in caught.value.hint


@pytest.mark.parametrize("path", ["./absent", "../absent", "~/absent", "/absent", "deep/down/absent"])
def test_a_path_that_does_not_exist_is_never_looked_up_on_the_hub(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(SourceError) as caught:
        open_source(path)
    assert caught.value.message == f"there is no folder {path}."
    assert caught.value.hint == "check the path"


def test_a_revision_of_a_local_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError) as caught:
        open_source(str(tmp_path), revision="v1.0")
    assert f"`revision='v1.0'` was given, but {tmp_path} is a local folder" in caught.value.message
    assert "drop `revision`" in caught.value.hint
