"""Which formats, widths and numbers of experts the programs that run a result take."""

from typing import Any

import pytest

from hcsmoe_hub.checkpoint.result_formats import (
    ROUTER_COUNTS,
    Shape,
    format_facts,
    nearest_experts,
    read_shape,
    round_width,
    router_warnings,
    tensor_parallel_sizes,
    whole_tiles,
)

NAMES = {
    "GGUF Q8_0 and Q4_0",
    "GGUF K-quants",
    "FP8 in blocks of 128",
    "FP8 per channel",
    "MXFP4",
    "NVFP4",
    "AWQ and GPTQ in groups of 128",
    "MLX in groups of 64",
}


def test_a_published_shape_fits_every_format() -> None:
    facts = format_facts(Shape(width=14336, hidden_size=4096))
    assert set(facts["to"]) == NAMES
    assert facts["not_to"] == {}


@pytest.mark.parametrize(
    ("width", "excluded"),
    [
        (1280, set()),
        (1152, {"GGUF K-quants"}),
        (
            1088,
            {"GGUF K-quants", "FP8 in blocks of 128", "AWQ and GPTQ in groups of 128"},
        ),
        (1056, NAMES - {"GGUF Q8_0 and Q4_0", "FP8 per channel", "MXFP4", "NVFP4"}),
        (1040, NAMES - {"FP8 per channel", "NVFP4"}),
        (1001, NAMES),
    ],
)
def test_a_width_excludes_the_formats_whose_blocks_it_cuts(width: int, excluded: set[str]) -> None:
    facts = format_facts(Shape(width=width, hidden_size=2048))
    assert set(facts["not_to"]) == excluded
    assert set(facts["to"]) == NAMES - excluded
    assert all(f"expert width {width} is not a multiple of " in reason for reason in facts["not_to"].values())


def test_the_hidden_size_is_the_row_length_of_the_other_matrices() -> None:
    reasons = format_facts(Shape(width=768, hidden_size=2880))["not_to"]
    assert reasons["GGUF K-quants"].startswith(
        "hidden size 2880 is not a multiple of 256; llama.cpp takes Q4_0 for Q2_K"
    )
    both = format_facts(Shape(width=192, hidden_size=128))["not_to"]["GGUF K-quants"]
    assert both.startswith("expert width 192 is not a multiple of 256 and hidden size 128 is not a multiple of 256;")


@pytest.mark.parametrize(
    ("config", "width", "expected"),
    [
        ({"hidden_size": 4096, "intermediate_size": 14336}, None, (14336, 4096)),
        ({"hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768}, None, (768, 2048)),
        ({"hidden_size": 2048, "moe_intermediate_size": 768}, 512, (512, 2048)),
        ({"text_config": {"hidden_size": 2048, "moe_intermediate_size": 768}}, None, (768, 2048)),
        ({"d_model": 6144, "ffn_config": {"ffn_hidden_size": 10752}}, None, None),
    ],
    ids=["one key", "dense layers", "known width", "nested", "other names"],
)
def test_the_shape_is_read_from_the_config(config: Any, width: int | None, expected: tuple[int, int] | None) -> None:
    found = read_shape(config, width)
    assert (found and (found.width, found.hidden_size)) == expected


@pytest.mark.parametrize(
    ("wanted", "nearest"), [(160, 192), (144, 128), (150, 128), (192, 192), (100, 128), (48, 64), (3, 4), (230, 192)]
)
def test_deepseek_v4_runs_the_nearest_number_of_experts_that_has_a_kernel(wanted: int, nearest: int) -> None:
    assert nearest_experts("deepseek_v4", wanted, 256) == nearest


def test_the_nearest_number_is_smaller_than_that_of_the_source() -> None:
    assert nearest_experts("deepseek_v4", 360, 384) == 320
    assert nearest_experts("deepseek_v4", 384, 384) == 384


def test_other_architectures_run_any_number_of_experts() -> None:
    assert [nearest_experts("qwen3_moe", experts, 128) for experts in (7, 96, 101)] == [7, 96, 101]
    assert router_warnings("qwen3_moe", 101, 128) == []


def test_a_number_without_a_kernel_is_warned_of_and_one_with_a_kernel_is_not() -> None:
    (warning,) = router_warnings("deepseek_v4", 160, 256)
    assert "160 experts" in warning
    assert "The nearest that runs is 192." in warning
    assert not any(router_warnings("deepseek_v4", experts, 576) for experts in ROUTER_COUNTS["deepseek_v4"])


def test_the_number_of_the_source_is_not_warned_of() -> None:
    assert router_warnings("deepseek_v4", 250, 250) == []


@pytest.mark.parametrize(
    ("width", "neurons", "rounded"),
    [(7168, 14336, 7168), (10000, 14336, 9984), (384, 768, 384), (96, 192, 96), (704, 1408, 768), (190, 192, 192)],
)
def test_a_share_of_the_neurons_is_rounded_to_a_width_that_formats_take(width: int, neurons: int, rounded: int) -> None:
    assert round_width(width, neurons) == rounded


def test_tensor_parallelism_divides_heads_and_widths() -> None:
    config = {"num_attention_heads": 32, "num_key_value_heads": 4, "moe_intermediate_size": 768}
    sizes = tensor_parallel_sizes(config, "qwen3_moe", 64)
    assert sizes == [1, 2, 4, 8, 16, 32]
    assert whole_tiles(sizes, 768) == [1, 2]
    assert tensor_parallel_sizes(config, "glm4_moe", 64) == []
