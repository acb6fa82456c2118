"""A conversion goes on to the same bytes whatever the model is like, or keeps nothing where that is not possible."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import save_tiny, tiny_config
from interruptions import InterruptedHere, at_layer, comparable, go_on, interrupt, undisturbed
from mtp_models import build_with_head
from quantized_models import deepseek_fp8, gpt_oss_mxfp4, kimi_int4
from tiny_models import options
from transformers import Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration

from hcsmoe_hub import convert
from hcsmoe_hub.events import Event, Stage, Warned
from hcsmoe_hub.options import Budget, ConvertOptions, Dtype, Layout, MethodOptions, Preset

WHY = "an interrupted conversion of this model cannot be continued: it computes with what earlier layers have returned."


def save_composite(folder: Path) -> None:
    """A language model next to a vision tower."""
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"patch_size": 4, "spatial_merge_size": 1, "temporal_patch_size": 1, "num_position_embeddings": 16}
    config = Qwen3_5MoeConfig(text_config=tiny_config("qwen3_5_moe_text").to_dict(), vision_config=vision)
    torch.manual_seed(0)
    Qwen3_5MoeForConditionalGeneration(config).save_pretrained(folder, max_shard_size="20KB")


SHARED_KEYS: dict[str, Any] = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
# How a model is built, and the layer in which its conversion ends.
KINDS: dict[str, tuple[Callable[[Path], Any], int]] = {
    "keys and values of earlier layers": (lambda folder: save_tiny("gemma4_text", folder, **SHARED_KEYS), 3),
    "inputs of every layer": (lambda folder: save_tiny("gemma4_text", folder, num_hidden_layers=4), 3),
    "several streams": (lambda folder: save_tiny("deepseek_v4", folder), 3),
    "indexers": (lambda folder: save_tiny("glm_moe_dsa", folder, num_hidden_layers=4), 3),
    "linear attention": (lambda folder: save_tiny("qwen3_next", folder), 3),
    "state space": (lambda folder: save_tiny("nemotron_h", folder), 3),
    "routers that look at the last one": (lambda folder: save_tiny("zaya", folder), 3),
    "embeddings of n-grams": (lambda folder: save_tiny("qwen4_exp_text", folder), 3),
    "head with the number of a layer": (lambda folder: build_with_head(folder, "deepseek_v3"), 1),
    "head that is next": (lambda folder: build_with_head(folder, "glm4_moe"), 2),
    "head with a name": (lambda folder: build_with_head(folder, "qwen3_next"), 2),
    "blocks of fp8": (deepseek_fp8, 1),
    "packed integers": (kimi_int4, 1),
    "mxfp4": (gpt_oss_mxfp4, 1),
    "vision tower": (save_composite, 3),
    "encoder that is not done": (lambda folder: save_tiny("switch_transformers", folder), 2),
    "encoder that is done": (lambda folder: save_tiny("nllb-moe", folder), 4),
    "decoder behind an encoder": (lambda folder: save_tiny("switch_transformers", folder), 5),
    "decoder behind an encoder with biases": (lambda folder: save_tiny("nllb-moe", folder), 5),
}


def prepared(folder: Path, make: Callable[[Path], Any], **changes: Any) -> tuple[Path, ConvertOptions]:
    """A model, and a conversion of it that is quick."""
    make(folder / "model")
    settings: dict[str, Any] = {"measure": False, "method": MethodOptions(preset=Preset.REAP), **changes}
    return folder / "model", options(folder / "model", 4, **settings)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_goes_on_to_the_same_bytes(kind: str, tmp_path: Path) -> None:
    make, layer = KINDS[kind]
    # Tokens that choose their experts by a table cannot do without any.
    preset = Preset.HC_SMOE if kind == "several streams" else Preset.REAP
    source, wanted = prepared(tmp_path, make, method=MethodOptions(preset=preset))
    interrupt(source, wanted, at_layer(layer))
    assert go_on(source, wanted) == {Stage.CONVERT: layer}
    assert comparable(tmp_path / "result") == undisturbed(source, wanted)


def test_a_quantised_source_that_is_written_as_plain_numbers_goes_on(tmp_path: Path) -> None:
    source, wanted = prepared(tmp_path, deepseek_fp8, dtype=Dtype.BFLOAT16)
    interrupt(source, wanted, at_layer(1))
    assert go_on(source, wanted) == {Stage.CONVERT: 1}
    assert comparable(tmp_path / "result") == undisturbed(source, wanted)


def look_back(folder: Path) -> None:
    """A model whose layers attend to what earlier layers have returned."""
    save_tiny("inkling2_text", folder)


def test_a_model_that_computes_with_what_earlier_layers_returned_keeps_nothing(tmp_path: Path) -> None:
    source, wanted = prepared(tmp_path, look_back)
    messages = list[str]()

    def listen(event: Event) -> None:
        if isinstance(event, Warned):
            messages.append(event.message)
        if at_layer(3)(event):
            raise InterruptedHere

    with pytest.raises(InterruptedHere):
        convert(source, wanted, listener=listen)
    assert messages.count(WHY) == 1
    assert not (tmp_path / "result").exists()
    assert go_on(source, wanted) == {}


def test_only_complete_statistics_of_such_a_model_are_gone_on_from(tmp_path: Path) -> None:
    method = MethodOptions(preset=Preset.HC_SMOE, budget=Budget.FREQUENCY, layout=Layout.MAPPED)
    source, wanted = prepared(tmp_path, look_back, method=method)
    interrupt(source, wanted, at_layer(3, Stage.OBSERVE))
    assert not (tmp_path / "result").exists()
    interrupt(source, wanted, at_layer(3))
    assert go_on(source, wanted) == {}
    assert comparable(tmp_path / "result") == undisturbed(source, wanted)
