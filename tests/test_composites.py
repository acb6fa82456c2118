"""A language model inside a multimodal checkpoint: the text experts are merged, everything else stays as it was."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import VOCABULARY, tiny_config
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration

from hcsmoe_hub import CalibrationOptions, ConvertOptions, convert
from hcsmoe_hub.checkpoint.source import LocalSource
from hcsmoe_hub.evaluation.checkpoint import Checkpoint
from hcsmoe_hub.model.skeleton import Skeleton

# More blocks than the decoder has layers: their numbers must not be mistaken for those of decoder layers.
VISION_BLOCKS = 6


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny Qwen3.5-MoE with a vision tower, and its conversion to three experts."""
    source, result = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("out") / "result"
    vision = {
        "depth": VISION_BLOCKS,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": 4,
        "spatial_merge_size": 1,
        "temporal_patch_size": 1,
        "num_position_embeddings": 16,
    }
    config = Qwen3_5MoeConfig(text_config=tiny_config("qwen3_5_moe_text").to_dict(), vision_config=vision)
    torch.manual_seed(0)
    Qwen3_5MoeForConditionalGeneration(config).save_pretrained(source, max_shard_size="20KB")
    ids = source.with_suffix(".npy")
    np.save(ids, np.random.default_rng(0).integers(3, VOCABULARY, (6, 12)))
    convert(source, ConvertOptions(experts=3, output=result, calibration=CalibrationOptions(dataset=str(ids))))
    return source, result


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for shard in folder.glob("*.safetensors") for name, tensor in load_file(shard).items()}


def test_result_loads_strictly_as_text_and_as_multimodal_model(folders: tuple[Path, Path]) -> None:
    for kind in (AutoModelForCausalLM, Qwen3_5MoeForConditionalGeneration):
        _, info = kind.from_pretrained(folders[1], output_loading_info=True)
        assert not any(info.values()), info


def test_vision_tower_is_copied_bit_for_bit(folders: tuple[Path, Path]) -> None:
    before, after = (stored(folder) for folder in folders)
    tower = [name for name in before if ".visual." in name]
    assert {name.split(".")[3] for name in tower if ".blocks." in name} == {str(n) for n in range(VISION_BLOCKS)}
    assert all(torch.equal(before[name], after[name]) for name in tower)


def test_only_the_count_of_the_text_model_changes_in_the_config(folders: tuple[Path, Path]) -> None:
    before, after = (json.loads((folder / "config.json").read_text()) for folder in folders)
    assert (before["text_config"].pop("num_experts"), after["text_config"].pop("num_experts")) == (6, 3)
    assert before == after


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_part_is_built_in_one_dtype_whatever_its_section_names(
    folders: tuple[Path, Path], dtype: torch.dtype
) -> None:
    config = json.loads((folders[0] / "config.json").read_text())
    for section, other in (("text_config", "bfloat16"), ("vision_config", "float32")):
        config[section]["dtype"] = other
    assert {parameter.dtype for parameter in Skeleton(config, dtype).module.parameters()} == {dtype}


def test_an_evaluation_counts_no_memory_for_a_vision_tower(folders: tuple[Path, Path]) -> None:
    of_text = sum(values.numel() for name, values in stored(folders[0]).items() if ".visual." not in name)
    assert Checkpoint(LocalSource(folders[0])).nbytes == 4 * of_text
