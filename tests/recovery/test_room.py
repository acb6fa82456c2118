"""Room on the disk for a recovery: for the result, the states of its training, and the teacher's logits."""

from collections.abc import Mapping
from pathlib import Path

import pytest
from recovered import StoppedHere, run, stop_at, wanted
from tiny_models import contents

from hcsmoe_hub.errors import OutputError
from hcsmoe_hub.planning import disk_space
from hcsmoe_hub.recovery.preview import RecoveryPreview, preview

pytestmark = pytest.mark.usefixtures("one_thread")


def previewed(source: Path, **others) -> RecoveryPreview:
    return preview(source.parent / "result", wanted(source, **others))


def leave(monkeypatch: pytest.MonkeyPatch, free: int | Mapping[str, int]) -> None:
    """Lets the disk have so much room, or the disk of each folder by its name."""
    if not isinstance(free, int):
        monkeypatch.setattr(disk_space, "disk_of", lambda path: path.name)

    def usage(path: Path) -> object:
        return type("Usage", (), {"free": free if isinstance(free, int) else free[path.name]})

    monkeypatch.setattr("shutil.disk_usage", usage)


def written(folder: Path, step: int) -> dict[str, int]:
    """Sizes of the files of a state of the training."""
    (state,) = folder.rglob(f"checkpoint-{step}")
    return {file.name: file.stat().st_size for file in state.iterdir()}


@pytest.mark.parametrize("train", ["router+experts+norms", "lora"])
def test_what_is_counted_is_what_is_written(source, train):
    found = previewed(source, train=train).disk
    assert found.download == found.logits == 0
    assert found.result == sum(path.stat().st_size for path in (source.parent / "result").glob("*.safetensors"))
    with pytest.raises(StoppedHere):
        run(source, train=train, listener=stop_at(10))
    sizes = written(source.parent / "recovered", 8)
    # Three of them: a state is removed once the next one is there.
    assert found.states == pytest.approx(3 * sum(sizes.values()), rel=0.3)
    assert found.states // 3 <= sum(sizes.values())


def test_a_short_training_has_fewer_states(source):
    assert previewed(source, max_steps=4).disk.states * 3 == previewed(source).disk.states


def test_a_recovery_for_which_there_is_no_room_is_refused_before_anything_is_written(source, monkeypatch):
    before = contents(source.parent)
    leave(monkeypatch, 1000)
    with pytest.raises(
        OutputError,
        match=r"result needs .* and the saved state of the training .*, but .*/recovered has 1\.0 KB free",
    ) as caught:
        run(source)
    assert caught.value.hint == "choose another disk with `output`, or train less with `train`"
    assert contents(source.parent) == before


def test_a_dry_run_warns_of_it(source, monkeypatch):
    assert previewed(source).warnings == []
    leave(monkeypatch, 1000)
    (warning,) = previewed(source).warnings
    assert "the saved state of the training" in warning
    assert warning.endswith("Choose another disk with `output`, or train less with `train`.")


def test_the_logits_may_go_to_another_disk(source, monkeypatch):
    (source.parent / "other").mkdir()
    folder = source.parent / "other" / "logits"
    leave(monkeypatch, {source.parent.name: 10**9, "other": 1000})
    (warning,) = previewed(source, teacher_logits=folder).warnings
    assert warning.startswith("the folder of logits needs ")
    assert "Choose another disk with `teacher_logits`, or keep fewer with `top_logits`." in warning


def test_what_an_interrupted_recovery_has_written_is_not_needed_again(source, monkeypatch):
    with pytest.raises(StoppedHere):
        run(source, listener=stop_at(10))
    needs = previewed(source).disk
    written = sum(file.stat().st_size for file in (source.parent / "recovered").rglob("*") if file.is_file())
    leave(monkeypatch, needs.result + needs.states - written // 2)
    assert previewed(source).warnings == []
