"""Room on disk: for the download and for the result, on one disk or two, with and without ``low_disk``."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from places import EXAMPLE

from hcsmoe_hub import CalibrationOptions, ConvertOptions, PushOptions
from hcsmoe_hub.checkpoint.pieces import Piece, Step, download_bytes, largest_pair, layer_pieces, whole_shards
from hcsmoe_hub.checkpoint.source import LocalSource
from hcsmoe_hub.convert import plan as plan_conversion
from hcsmoe_hub.errors import OutputError
from hcsmoe_hub.machine.units import format_bytes
from hcsmoe_hub.options import Budget, Layout, MethodOptions
from hcsmoe_hub.planning import disk_space
from hcsmoe_hub.planning.conversion_plan import ConversionPlan
from hcsmoe_hub.planning.estimate import estimate_needs

PUSH = PushOptions(repo_id="me/model")


class Distant(LocalSource):
    """The example, as if nothing of it had been downloaded yet."""

    def __init__(self, cache: Path) -> None:
        super().__init__(EXAMPLE)
        self.cache = cache

    def pieces(self, steps: Sequence[Step], *, low_disk: bool) -> list[list[Piece]]:
        sizes = {shard: (EXAMPLE / shard).stat().st_size for shard in self.shards}
        return layer_pieces(steps, sizes) if low_disk else whole_shards(steps, sizes)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


@pytest.fixture
def plan(cache: Path, tmp_path: Path) -> ConversionPlan:
    (tmp_path / "results").mkdir()
    calibration = CalibrationOptions(dataset="bundled", samples=2, sequence_length=32)
    options = ConvertOptions(
        experts=4, output=tmp_path / "results" / "result", calibration=calibration, max_shard_size="500KB"
    )
    return plan_conversion(Distant(cache), options)


def lean(plan: ConversionPlan, **changes: Any) -> ConversionPlan:
    return replace(plan, options=replace(plan.options, low_disk=True, **changes))


def refusals(plan: ConversionPlan, free: Mapping[str, int], monkeypatch: pytest.MonkeyPatch) -> list[OutputError]:
    """What is said with so much room in ``cache`` and ``results``, or on the disk of both, ``one``."""
    if "one" not in free:
        monkeypatch.setattr(disk_space, "disk_of", lambda path: path.name)

    def usage(path: Path) -> object:
        return type("Usage", (), {"free": free.get("one", free.get(path.name))})

    monkeypatch.setattr("shutil.disk_usage", usage)
    return disk_space.disk_shortages(plan, estimate_needs(plan))


def refusal(plan: ConversionPlan, free: Mapping[str, int], monkeypatch: pytest.MonkeyPatch) -> OutputError | None:
    """The only refusal, if there is one."""
    found = refusals(plan, free, monkeypatch)
    assert len(found) <= 1
    return found[0] if found else None


def test_everything_that_is_downloaded_and_written_stays(plan: ConversionPlan) -> None:
    needs = estimate_needs(plan)
    assert needs.download_bytes == needs.cache_bytes == sum(path.stat().st_size for path in EXAMPLE.glob("*.safet*rs"))
    # Two bytes for each neuron of the result: its expert and its number there.
    neurons = 2 * sum(plan.experts_by_layer.values()) * plan.width
    assert needs.disk_bytes == plan.shards.file_bytes + neurons


def test_little_disk_holds_two_layers_of_the_source(plan: ConversionPlan) -> None:
    needs, pieces = estimate_needs(lean(plan)), plan.model.source.pieces(plan.reading_order, low_disk=True)
    assert (needs.download_bytes, needs.cache_bytes) == (download_bytes(pieces), largest_pair(pieces))
    assert needs.cache_bytes < estimate_needs(plan).cache_bytes // 2
    # What is not pushed has to stay.
    assert needs.disk_bytes == estimate_needs(plan).disk_bytes


def test_little_disk_holds_one_shard_of_a_result_that_is_pushed(plan: ConversionPlan) -> None:
    needs = estimate_needs(lean(plan, push=PUSH))
    embeddings = plan.shards.tensors["model.embed_tokens.weight"].nbytes
    assert embeddings < needs.disk_bytes < embeddings + 1000 < estimate_needs(plan).disk_bytes // 3
    assert (
        estimate_needs(replace(plan, options=replace(plan.options, push=PUSH))).disk_bytes
        == estimate_needs(plan).disk_bytes
    )


def test_weights_that_are_read_twice_come_twice_where_they_do_not_stay(plan: ConversionPlan) -> None:
    method = MethodOptions(layout=Layout.MAPPED, budget=Budget.FREQUENCY)
    twice = plan_conversion(plan.model.source, replace(plan.options, method=method))
    assert not twice.is_final
    assert estimate_needs(twice).download_bytes == estimate_needs(plan).download_bytes
    assert estimate_needs(lean(twice)).download_bytes == 2 * estimate_needs(lean(plan)).download_bytes
    assert estimate_needs(lean(twice)).cache_bytes == estimate_needs(lean(plan)).cache_bytes


def test_a_local_folder_needs_no_cache(plan: ConversionPlan) -> None:
    needs = estimate_needs(plan_conversion(EXAMPLE, plan.options))
    assert (needs.download_bytes, needs.cache_bytes) == (0, 0)


def test_each_disk_is_enough_for_what_goes_there(plan: ConversionPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = estimate_needs(plan)
    room_for_both = {"cache": needs.cache_bytes, "results": needs.disk_bytes + needs.checkpoint_bytes}
    assert refusal(plan, room_for_both, monkeypatch) is None
    error = refusal(plan, room_for_both | {"cache": needs.cache_bytes - 1}, monkeypatch)
    assert error is not None
    assert error.message.startswith(f"the download needs {format_bytes(needs.cache_bytes)}, but ")
    assert "`cache_dir`" in error.hint
    frugal = estimate_needs(lean(plan))
    assert error.hint.endswith(
        "or add `low_disk=True`, which needs "
        + format_bytes(frugal.cache_bytes + frugal.disk_bytes + frugal.checkpoint_bytes)
    )
    error = refusal(plan, room_for_both | {"results": needs.disk_bytes + needs.checkpoint_bytes - 1}, monkeypatch)
    assert error is not None
    assert error.message.startswith(f"the result needs {format_bytes(needs.disk_bytes + needs.checkpoint_bytes)}, but ")
    # It would not help: nothing is pushed.
    assert error.hint == "choose another disk with `output`"


def test_one_disk_has_to_hold_the_download_and_the_result(
    plan: ConversionPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = estimate_needs(plan)
    both = needs.cache_bytes + needs.disk_bytes + needs.checkpoint_bytes
    assert refusal(plan, {"one": both}, monkeypatch) is None
    error = refusal(plan, {"one": both - 1}, monkeypatch)
    assert error is not None
    download, result = format_bytes(needs.cache_bytes), format_bytes(needs.disk_bytes + needs.checkpoint_bytes)
    assert f"the download needs {download} and the result {result}, but the disk of " in error.message
    assert "`low_disk=True`" in error.hint


def test_a_push_is_a_reason_for_little_disk(plan: ConversionPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed = replace(plan, options=replace(plan.options, push=PUSH))
    error = refusal(pushed, {"cache": 10**9, "results": 2_000_000}, monkeypatch)
    assert error is not None
    assert "`low_disk=True`" in error.hint
    assert refusal(lean(pushed), {"cache": 10**9, "results": 2_000_000}, monkeypatch) is None


def test_little_disk_is_not_offered_where_it_is_not_enough(
    plan: ConversionPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = refusal(plan, {"one": 1000}, monkeypatch)
    assert error is not None
    assert "`low_disk=True`" not in error.hint
    frugal = refusal(lean(plan), {"one": 1000}, monkeypatch)
    assert frugal is not None
    assert "`low_disk=True`" not in frugal.hint


def test_each_of_two_disks_is_named(plan: ConversionPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = refusals(plan, {"cache": 1000, "results": 1000}, monkeypatch)
    assert first.message.startswith("the download needs ")
    assert second.message.startswith("the result needs ")


def test_a_statistics_file_needs_room_as_well(
    plan: ConversionPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "observed").mkdir()
    kept = plan_conversion(plan.model.source, replace(plan.options, statistics=tmp_path / "observed" / "file"))
    needs = estimate_needs(kept)
    room = {
        "cache": needs.cache_bytes,
        "results": needs.disk_bytes + needs.checkpoint_bytes,
        "observed": needs.statistics_bytes,
    }
    assert refusal(kept, room, monkeypatch) is None
    error = refusal(kept, room | {"observed": needs.statistics_bytes - 1}, monkeypatch)
    assert error is not None
    assert error.message.startswith(f"the statistics file needs {format_bytes(needs.statistics_bytes)}, but ")
    assert error.hint == "choose another disk with `statistics`, or add `keep_states=False`"
    lighter = replace(kept, options=replace(kept.options, keep_states=False))
    assert estimate_needs(lighter).statistics_bytes < needs.statistics_bytes // 2
