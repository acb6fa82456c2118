"""The benchmark at equal bytes: it refuses without llama.cpp, maps tensors back, and compares with the source."""

import argparse
import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from places import ROOT

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(ROOT / "benchmarks"))
    gguf, bench = map(importlib.import_module, ("bytes_gguf", "bytes"))

MIXTRAL = {"model_type": "mixtral", "num_local_experts": 2, "num_attention_heads": 2, "num_key_value_heads": 1}


def test_without_the_converter_it_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"has no convert_hf_to_gguf.py(.|\n)*pip install llama-cpp-py-sync"):
        gguf.LlamaCpp(tmp_path, tmp_path / "python")


def test_without_the_quantiser_it_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "gguf-py").mkdir()
    (tmp_path / "convert_hf_to_gguf.py").write_text("")
    with pytest.raises(SystemExit, match=r"does not exist(.|\n)*pip install llama-cpp-py-sync"):
        gguf.LlamaCpp(tmp_path, tmp_path / "python")


def test_the_experts_of_a_stacked_tensor_are_told_apart() -> None:
    shapes = {f"model.layers.3.block_sparse_moe.experts.{number}.w2.weight": [2, 3] for number in (0, 1)}
    values = np.arange(12, dtype=np.float32)
    found = gguf._named("blk.3.ffn_down_exps.weight", values, MIXTRAL, shapes)
    assert [tensor.tolist() for tensor in found.values()] == [[[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10, 11]]]
    assert list(found) == list(shapes)


def test_the_order_in_which_llama_cpp_stores_query_heads_is_undone() -> None:
    weight = torch.arange(16.0).reshape(8, 2)
    # As its converter permutes them: halves of a head become pairs.
    stored = weight.reshape(2, 2, 2, 2).swapaxes(1, 2).reshape(8, 2)
    assert not stored.equal(weight)
    name = "model.layers.0.self_attn.q_proj.weight"
    found = gguf._named("blk.0.attn_q.weight", stored.numpy().ravel(), MIXTRAL, {name: [8, 2]})
    assert found[name].equal(weight)


def test_a_tensor_of_no_known_place_is_refused() -> None:
    with pytest.raises(SystemExit, match=r"rope_freqs\.weight of the GGUF file is not a tensor of mixtral"):
        gguf._named("rope_freqs.weight", np.zeros(2, np.float32), MIXTRAL, {})


def test_a_checkpoint_that_changes_on_the_way_is_refused() -> None:
    tensors = {"norm": torch.ones(2, dtype=torch.bfloat16)}
    stored = gguf.Stored({"norm": torch.ones(2)}, tensor_bytes=8, parameters=2, types={"F32": 1.0})
    bench.check_round_trip(stored, tensors)
    with pytest.raises(SystemExit, match="norm is not the same"):
        bench.check_round_trip(stored, {"norm": torch.zeros(2)})
    with pytest.raises(SystemExit, match="1 tensors, the checkpoint 0"):
        bench.check_round_trip(stored, {})


def test_conversions_are_shares_of_the_experts_and_shapes_of_the_command_line() -> None:
    wanted = argparse.Namespace(keep=[0.75, 0.5], shapes=["8x96", "6x128"])
    assert bench.shapes(wanted, 8, 192) == [(6, 192), (4, 192), (8, 96), (6, 128)]


def test_rows_are_joined_only_for_formats_that_want_long_ones() -> None:
    assert [point.joined for point in bench.points(("m", 8, 192), "Q8_0")] == [False]
    assert [point.joined for point in bench.points(("m", 8, 192), "Q4_K_M")] == [False, True]


def test_the_table_is_in_the_order_of_bytes_and_relative_to_the_untouched_model() -> None:
    def row(experts: int, format: str, size: int, perplexity: float) -> dict[str, Any]:
        return {
            **{"model": "m", "experts": experts, "width": 192, "format": format, "joined": format == "Q2_K"},
            **{"tensor_bytes": size, "bits_per_weight": 16.0, "types": {"BF16": 0.9996, "F32": 0.0004}},
            "perplexity": {"all": perplexity, "code": 2 * perplexity, "prose": perplexity / 2},
        }

    rows = [row(8, "BF16", 6_000_000, 10.0), row(8, "Q2_K", 1_000_000, 15.0), row(4, "BF16", 4_000_000, 12.0)]
    (table,) = bench.tables(rows)
    assert table.splitlines()[4:] == [
        "| 1.00 | untouched | Q2_K, rows joined | 16.00 | BF16 100% | 1.500 | code 1.500 |",
        "| 4.00 | 4 experts of 192 | BF16 | 16.00 | BF16 100% | 1.200 | code 1.200 |",
        "| 6.00 | untouched | BF16 | 16.00 | BF16 100% | 1.000 | code 1.000 |",
    ]
