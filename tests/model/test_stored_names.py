"""Results keep the names that are stored, whatever prefix they have and however a tensor lies there."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import (
    build,
    change_config,
    change_tensors,
    differing,
    options,
    read_tensors,
    refuse,
    token_ids,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

from hcsmoe_hub import convert, verify
from hcsmoe_hub.checkpoint.source import LocalSource
from hcsmoe_hub.errors import SourceError

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
}
VISION = {
    "depth": 3,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
    "spatial_merge_size": 1,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}


def rename(folder: Path, change: Callable[[str], str]) -> None:
    def apply(tensors: dict[str, Tensor]) -> None:
        renamed = {change(name): tensor for name, tensor in tensors.items()}
        tensors.clear()
        tensors.update(renamed)

    change_tensors(folder, apply)


def without_head(folder: Path) -> Path:
    """What saving the base model of a causal language model leaves: no head, and no ``model.`` in front of names."""
    change_tensors(folder, lambda tensors: tensors.pop("lm_head.weight", None))
    rename(folder, lambda name: name.removeprefix("model."))
    return folder


def logits(folder: Path) -> Tensor:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        found: Tensor = model.eval()(token_ids()).logits
    return found


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_a_tied_base_model_keeps_its_short_names(tmp_path: Path, model_type: str) -> None:
    source = without_head(build(tmp_path / "model", model_type, tie_word_embeddings=True))
    same, half = options(source, 8, output=tmp_path / "same"), options(source, 4, output=tmp_path / "half")
    convert(source, same)
    assert differing(read_tensors(same.output), read_tensors(source)) == []
    assert torch.equal(logits(same.output), logits(source))
    convert(source, half)
    names = read_tensors(half.output).keys()
    assert names < read_tensors(source).keys()
    assert not any(name.startswith("model.") for name in names)
    assert verify(half.output, against=LocalSource(source)).experts == 4


def test_a_base_model_whose_head_is_not_tied_is_refused_by_the_tensor_that_it_lacks(tmp_path: Path) -> None:
    source = without_head(build(tmp_path / "model"))
    assert "lacks the tensor for 'lm_head.weight'" in refuse(source, SourceError, options(source, 4)).message


@pytest.mark.parametrize("width", [24, 32], ids=["rectangular", "square"])
@pytest.mark.parametrize("as_published", [True, False], ids=["published", "saved_by_transformers"])
def test_experts_that_are_stored_transposed_stay_so(tmp_path: Path, width: int, *, as_published: bool) -> None:
    """Published Qwen3-VL checkpoints hold ``[E, H, 2I]`` and ``[E, I, H]``, transformers the transposed matrices.

    Where H = I, transformers cannot tell them apart, and takes what is stored as it is.
    """
    torch.manual_seed(0)
    config = Qwen3VLMoeConfig(text_config=TEXT | {"moe_intermediate_size": width}, vision_config=VISION)
    model = Qwen3VLMoeForConditionalGeneration(config)
    source, result = tmp_path / "model", tmp_path / "result"
    model.save_pretrained(source, max_shard_size="60KB")
    if as_published and width != TEXT["hidden_size"]:
        experts = [name for name in read_tensors(source) if "experts" in name]
        change_tensors(source, lambda found: found.update({name: found[name].mT.contiguous() for name in experts}))
    convert(source, options(source, 4, output=result))
    before, after = read_tensors(source), read_tensors(result)
    assert after.keys() == before.keys()
    for name in before:
        assert after[name].shape[1:] == before[name].shape[1:], name
    assert verify(result, against=LocalSource(source)).experts == 4


def test_a_checkpoint_that_names_a_class_without_a_head_is_read_as_the_language_model(tmp_path: Path) -> None:
    source = build(tmp_path / "model")
    change_config(source, architectures=["MixtralModel"])
    convert(source, options(source, 4))
    assert read_tensors(tmp_path / "result").keys() < read_tensors(source).keys()
