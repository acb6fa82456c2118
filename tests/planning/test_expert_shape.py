"""How wide experts become: the key that sets it, what a share is rounded to, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
from architectures import save_tiny
from quantized_models import deepseek_fp8, gpt_oss_mxfp4, kimi_int4
from tiny_models import build, change_config, options, read_config, refuse

from hcsmoe_hub import plan
from hcsmoe_hub.checkpoint.source import LocalSource
from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.model.source_model import read_model
from hcsmoe_hub.model.width import ExpertWidth, find_width
from hcsmoe_hub.options import Dtype, Layout, MethodOptions, Preset
from hcsmoe_hub.planning.conversion_plan import ConversionPlan
from hcsmoe_hub.planning.expert_shape import round_width
from hcsmoe_hub.planning.sizes import active_parameter_counts, parameter_counts


def planned(source: Path, width: int | str, **others: Any) -> ConversionPlan:
    return plan(source, options(source, None, expert_width=width, **others))


def width_of(source: Path) -> ExpertWidth:
    return find_width(read_model(LocalSource(source)))


def refusal(source: Path, width: int | str, **others: Any) -> PlanError:
    wanted = options(source, None, expert_width=width, **others)
    found = refuse(source, PlanError, wanted)
    assert isinstance(found, PlanError)
    return found


# Which key


def test_the_key_of_routed_experts_is_found_although_others_hold_the_same_number(tmp_path: Path) -> None:
    source = build(tmp_path / "model", "qwen2_moe", num_experts=8, shared_expert_intermediate_size=24)
    found = width_of(source)
    assert (found.key, found.size, found.shared_key, found.aliases) == ("moe_intermediate_size", 24, None, ())


def test_shared_experts_of_the_same_width_follow_by_their_number(tmp_path: Path) -> None:
    found = width_of(build(tmp_path / "model", "deepseek_v3"))
    assert (found.key, found.shared_key, found.shared) == ("moe_intermediate_size", "n_shared_experts", 1)
    assert [found.takes(width) for width in (24, 12, 8, 16, 18)] == [True, True, True, False, False]


def test_another_name_of_the_width_that_transformers_does_not_read_follows(tmp_path: Path) -> None:
    save_tiny("aria_text", tmp_path / "model")
    change_config(tmp_path / "model", moe_intermediate_size=48)
    config = planned(tmp_path / "model", 24).config
    assert (config["intermediate_size"], config["moe_intermediate_size"], config["moe_num_shared_experts"]) == (
        24,
        24,
        2,
    )


def test_a_size_of_other_layers_that_is_equal_stays(tmp_path: Path) -> None:
    source = build(tmp_path / "model", "qwen3_moe", intermediate_size=24)
    config = planned(source, 12).config
    assert (config["moe_intermediate_size"], config["intermediate_size"]) == (12, 24)


def test_nothing_else_changes_in_the_config(tmp_path: Path) -> None:
    source = build(tmp_path / "model")
    assert planned(source, 16).config == read_config(source) | {"intermediate_size": 16}


def test_a_width_that_also_sets_dense_layers_is_refused(tmp_path: Path) -> None:
    save_tiny("jamba", tmp_path / "model")
    found = refusal(tmp_path / "model", "50%")
    assert "intermediate_size of its config also sets the size of model.layers.0.feed_forward" in found.message


# How wide


@pytest.mark.parametrize(
    ("width", "neurons", "found"),
    [
        (7168, 14336, 7168),
        (1440, 2880, 1536),
        (704, 1408, 768),
        (352, 704, 384),
        (528, 768, 512),
        (96, 192, 96),
        (72, 96, 72),
        (12, 24, 12),
        (253, 256, 256),
    ],
)
def test_a_share_becomes_a_round_number_nearby(width: int, neurons: int, found: int) -> None:
    assert round_width(width, neurons) == found


def test_a_number_is_taken_as_it_is(tmp_path: Path) -> None:
    assert planned(build(tmp_path / "model"), 37).width == 37


def test_a_share_becomes_what_shared_experts_allow(tmp_path: Path) -> None:
    source = build(tmp_path / "model", "deepseek_v3", moe_intermediate_size=352, n_shared_experts=2)
    assert round_width(176, 352) == 192
    made = planned(source, "50%")
    assert (made.width, made.config["n_shared_experts"]) == (176, 4)


def test_a_share_that_keeps_all_neurons_once_it_is_rounded_changes_nothing(tmp_path: Path) -> None:
    source = build(tmp_path / "model", intermediate_size=256)
    made = planned(source, "99%")
    assert (made.is_narrower, made.width, made.config) == (False, 256, read_config(source))
    assert made.warnings == ["`expert_width=99%` keeps all that the model has; the result will not be smaller."]


@pytest.mark.parametrize("width", [48, "100%"])
def test_all_neurons_need_no_key(tmp_path: Path, width: int | str) -> None:
    save_tiny("jamba", tmp_path / "model")
    assert not planned(tmp_path / "model", width).is_narrower


def test_more_neurons_than_there_are_are_refused(tmp_path: Path) -> None:
    found = refusal(build(tmp_path / "model"), 49)
    assert "cannot keep 49 neurons per expert" in found.message
    assert "it has 48" in found.message


def test_a_width_that_shared_experts_do_not_allow_is_refused_with_the_nearest(tmp_path: Path) -> None:
    found = refusal(build(tmp_path / "model", "deepseek_v3"), 18)
    assert "its shared experts are 24 wide, which config.json gives as n_shared_experts times" in found.message
    assert found.hint == "use `expert_width=8 or 12`"


@pytest.mark.parametrize("layout", [Layout.MAPPED, Layout.FULL])
def test_layouts_with_the_config_of_the_source_have_its_width(tmp_path: Path, layout: Layout) -> None:
    method = MethodOptions(preset=Preset.HC_SMOE, layout=layout)
    found = refusal(build(tmp_path / "model"), 24, method=method)
    assert found.message.startswith("`expert_width` needs a config that says how wide experts are")


# Formats


def test_mxfp4_takes_whole_blocks(tmp_path: Path) -> None:
    source = gpt_oss_mxfp4(tmp_path / "model")
    found = refusal(source, 48)
    assert "cannot be 48 neurons wide: its weights are stored in blocks of 32 neurons" in found.message
    assert found.hint == "use `expert_width=32 or 64`, or `dtype='bfloat16'`"
    assert planned(source, 48, dtype=Dtype.BFLOAT16).width == 48


def test_packed_integers_take_whole_groups(tmp_path: Path) -> None:
    found = refusal(kimi_int4(tmp_path / "model"), 48)
    assert "blocks of 32 neurons" in found.message
    assert found.hint == "use `expert_width=32`, or `dtype='bfloat16'`"


def test_blocks_of_fp8_may_be_partial_ones(tmp_path: Path) -> None:
    assert planned(deepseek_fp8(tmp_path / "model"), 100).width == 100


# Sizes


def test_parameters_fall_with_the_width(tmp_path: Path) -> None:
    source = build(tmp_path / "model")
    made = planned(source, "50%")
    experts = 2 * 8 * 3 * 48 * 32
    counts, active = parameter_counts(made), active_parameter_counts(made)
    assert counts["before"] - counts["after"] == experts // 2
    assert active["before"] - active["after"] == experts // 8
    assert made.kept_share == 0.5
    assert made.output.name == "result"
