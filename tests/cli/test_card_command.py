"""``hcsmoe card``: the card of a real conversion, for a person, a program and a script."""

import shutil

import pytest


@pytest.fixture
def copy(converted, tmp_path):
    """A copy of a converted checkpoint, without a card."""
    folder, _ = converted
    shutil.copytree(folder, tmp_path / "result")
    (tmp_path / "result" / "README.md").unlink(missing_ok=True)
    return tmp_path / "result"


def test_card_is_written_and_shown_to_a_person(run, copy):
    result = run("card", copy)
    assert result.code == 0
    assert result.stdout.splitlines()[0] == f"✓ Wrote {copy / 'README.md'}"
    assert result.stdout.splitlines()[1].split() == ["quality", "held-out", "text"]
    assert "Hint: measure it with 'hcsmoe evaluate'" in result.stderr
    text = (copy / "README.md").read_text("utf-8")
    assert "# result\n" in text
    assert "hcsmoe convert tiny-mixtral --experts 4 --preset hc-smoe --samples 2" in " ".join(
        text.replace("\\\n", " ").split()
    )
    assert str(copy.parent) not in text


def test_card_is_one_json_document(run, copy):
    result = run("card", copy, "--repo-id", "me/result-4e", "--json")
    document = result.document()
    assert (result.code, document["path"], document["repo_id"]) == (0, str(copy / "README.md"), "me/result-4e")
    assert (document["measures"], document["kept_sections"]) == (["held-out text"], 0)
    assert 'from_pretrained("me/result-4e"' in (copy / "README.md").read_text("utf-8")


def test_quiet_card_is_a_path(run, copy):
    result = run("card", copy, "-q")
    assert (result.code, result.stdout, result.stderr) == (0, f"{copy / 'README.md'}\n", "")


def test_foreign_card_needs_overwrite(run, copy):
    (copy / "README.md").write_text("mine", "utf-8")
    refused = run("card", copy)
    assert (refused.code, refused.stdout) == (1, "")
    assert "was not written by hcsmoe" in refused.stderr
    assert "--overwrite" in refused.stderr
    assert run("card", copy, "--overwrite", "-q").code == 0


def test_missing_folder_is_reported(run, tmp_path):
    result = run("card", tmp_path / "nothing")
    assert result.code == 1
    assert "there is no folder" in result.stderr


def test_json_and_quiet_contradict_each_other(run, copy):
    assert run("card", copy, "--json", "--quiet").code == 2
