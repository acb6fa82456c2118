"""Numbers, sizes, devices and paths are checked where options are made."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hcsmoe_hub import (
    CalibrationOptions,
    ConvertOptions,
    CurveOptions,
    EvaluateOptions,
    HcsmoeError,
    MethodOptions,
    PlanError,
    PushOptions,
)
from hcsmoe_hub.options.memory_limits import limit_of

COUNTS = [
    (CalibrationOptions, "samples"),
    (CalibrationOptions, "sequence_length"),
    (CalibrationOptions, "feature_tokens"),
    (ConvertOptions, "experts"),
    (ConvertOptions, "experts_per_token"),
    (ConvertOptions, "batch_tokens"),
    (EvaluateOptions, "window"),
]
NATURALS = [(CalibrationOptions, "seed"), (EvaluateOptions, "generate")]
REQUIRED: dict[type, dict[str, Any]] = {ConvertOptions: {"experts": 4}, PushOptions: {"repo_id": "me/model"}}


def make(kind: type, **given: Any) -> Any:
    """Options with the required fields."""
    return kind(**(REQUIRED.get(kind, {}) | given))


def refused(kind: type, name: str, value: Any) -> str:
    """Why a value is refused; the refusal names the field and no flag."""
    with pytest.raises(PlanError) as caught:
        make(kind, **{name: value})
    assert caught.value.option == name
    assert "--" not in caught.value.message + caught.value.hint
    return caught.value.message.removeprefix(f"`{name}`: ")


@pytest.mark.parametrize(("kind", "name"), COUNTS)
def test_a_count_is_a_whole_number_of_one_or_more(kind: type, name: str) -> None:
    assert refused(kind, name, 0) == "0 is too small; the lowest value is 1."
    assert refused(kind, name, -1) == "-1 is too small; the lowest value is 1."
    assert refused(kind, name, "4") == "'4' is not a whole number."
    assert refused(kind, name, 1.5) == "1.5 is not a whole number."
    assert refused(kind, name, True) == "True is not a whole number."
    assert getattr(make(kind, **{name: 1}), name) == 1


@pytest.mark.parametrize(("kind", "name"), NATURALS)
def test_seeds_and_numbers_of_prompts_may_be_zero(kind: type, name: str) -> None:
    assert refused(kind, name, -1) == "-1 is too small; the lowest value is 0."
    assert refused(kind, name, False) == "False is not a whole number."
    assert getattr(make(kind, **{name: 0}), name) == 0


def test_numbers_of_numpy_become_numbers_of_python() -> None:
    assert type(ConvertOptions(experts=np.int64(4)).experts) is int  # type: ignore[arg-type]


@pytest.mark.parametrize("size", ["5 apples", "5", "GB", "-5GB", "0GB", "5GiB", "1e3GB"])
def test_a_shard_size_has_a_unit(size: str) -> None:
    assert refused(ConvertOptions, "max_shard_size", size) == (
        f"'{size}' is not a size; write a number and KB, MB, GB, TB, such as 5GB."
    )


def test_a_shard_size_is_kept_as_the_writer_reads_it() -> None:
    assert ConvertOptions(experts=4, max_shard_size="1.5 gb").max_shard_size == "1.5GB"


@pytest.mark.parametrize("kind", [ConvertOptions, EvaluateOptions])
@pytest.mark.parametrize("device", ["tpu", "cpu:1", "cuda:x", "cuda:-1", ""])
def test_a_device_of_no_known_kind_is_refused(kind: type, device: str) -> None:
    message = refused(kind, "device", device)
    assert message.startswith(f"'{device}' is unknown")
    assert message.endswith("Known values: auto, cpu, cuda, cuda:N.")


def test_gpu_is_answered_with_cuda() -> None:
    assert "did you mean 'cuda'?" in refused(ConvertOptions, "device", "GPU")


@pytest.mark.parametrize(
    ("kind", "name"),
    [(ConvertOptions, "output"), (ConvertOptions, "statistics"), (EvaluateOptions, "perplexity")],
)
def test_a_path_may_be_a_text(kind: type, name: str) -> None:
    assert getattr(make(kind, **{name: "a/file"}), name) == Path("a/file")
    assert refused(kind, name, 3) == "3 is not a path."


def test_a_calibration_file_may_be_a_path() -> None:
    assert CalibrationOptions(dataset=Path("a/file.txt")).dataset == "a/file.txt"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (ConvertOptions, "overwrite"),
        (ConvertOptions, "figure"),
        (ConvertOptions, "low_disk"),
        (PushOptions, "private"),
        (PushOptions, "create_pr"),
        (EvaluateOptions, "stream"),
    ],
)
def test_a_switch_is_true_or_false(kind: type, name: str) -> None:
    assert refused(kind, name, "yes") == "'yes' is not True or False."
    assert refused(kind, name, 1) == "1 is not True or False."


def test_options_within_options_are_options() -> None:
    assert refused(ConvertOptions, "method", "prune") == "'prune' is not an instance of MethodOptions."
    assert refused(ConvertOptions, "method", None) == "None is not an instance of MethodOptions."
    assert refused(ConvertOptions, "push", "me/model") == "'me/model' is not an instance of PushOptions."
    assert make(ConvertOptions, method=MethodOptions(), push=None).push is None


def test_one_task_may_be_a_word() -> None:
    assert EvaluateOptions(tasks="hc-smoe").tasks == ("hc-smoe",)  # type: ignore[arg-type]
    assert EvaluateOptions(tasks=["a", "b"]).tasks == ("a", "b")  # type: ignore[arg-type]


def test_an_error_names_the_first_option_of_its_message_or_else_of_its_hint() -> None:
    assert HcsmoeError("`layers` and `budget` differ.", hint="use `layout='full'`").option == "layers"
    assert HcsmoeError("there is no room.", hint="use `layout='full'`").option == "layout"
    assert HcsmoeError("there is no room.", hint="make some").option is None
    assert HcsmoeError("`layers` differ.", hint="use fewer", option="experts").option == "experts"


def test_a_limit_on_memory_is_for_the_host_unless_it_names_a_place() -> None:
    for kind in (ConvertOptions, CurveOptions):
        assert make(kind, max_memory=1000).max_memory == {"cpu": 1000}
        assert make(kind, max_memory="24GB").max_memory == {"cpu": 24 * 10**9}
        given = {"cpu": "24GB", 0: "40GB", "cuda:1": 5, "cuda": 7}
        assert make(kind, max_memory=given).max_memory == {
            "cpu": 24 * 10**9,
            "cuda:0": 40 * 10**9,
            "cuda:1": 5,
            "cuda": 7,
        }


def test_a_limit_on_memory_is_a_size_of_a_place() -> None:
    assert refused(ConvertOptions, "max_memory", 0) == "0 is too small; the lowest value is 1."
    assert refused(ConvertOptions, "max_memory", "much").startswith("'much' is not a size")
    assert refused(ConvertOptions, "max_memory", 1.5) == "1.5 is not a whole number."
    assert refused(ConvertOptions, "max_memory", {"cuda": True}) == "True is not a whole number."
    assert refused(ConvertOptions, "max_memory", {}) == "it names no limit."
    place = "'disk' is not a place that has memory; write cpu, cuda or cuda:N."
    assert refused(ConvertOptions, "max_memory", {"disk": 5}) == place


@pytest.mark.parametrize(("index", "limit"), [(None, 1), (0, 2), (1, 3), (7, 3)])
def test_the_limit_of_a_certain_accelerator_goes_before_that_of_all(index: int | None, limit: int) -> None:
    assert limit_of({"cpu": 1, "cuda:0": 2, "cuda": 3}, index) == limit
    assert limit_of(None, index) is None
