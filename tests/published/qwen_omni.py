"""Qwen3-Omni: a thinker that reads text, images and sound, a talker with experts of its own, and a vocoder."""

from typing import Any

from published.checkpoint import Checkpoint
from published.collector import NORMS, Config, Tensors, attention, embeddings, head_dim
from published.qwen import qk_norms, sparse_block


def qwen3_omni(t: Tensors, config: Config) -> None:
    """Qwen3-Omni."""
    thinker, talker = config["thinker_config"], config["talker_config"]
    _decoder(t, "thinker.model", thinker["text_config"])
    embeddings(t, thinker["text_config"], "thinker.model.", head="thinker.lm_head")
    _audio_tower(t, "thinker.audio_tower", thinker["audio_config"])
    _vision_tower(t, "thinker.visual", thinker["vision_config"])
    _talker(t, "talker", talker)
    _vocoder(t, "code2wav", config["code2wav_config"])


def _decoder(t: Tensors, name: str, config: Config) -> None:
    """Layers with routed experts."""
    for layer in range(config["num_hidden_layers"]):
        p = f"{name}.layers.{layer}"
        t.norms(p, NORMS, config["hidden_size"])
        attention(t, f"{p}.self_attn", config)
        qk_norms(t, f"{p}.self_attn", head_dim(config))
        sparse_block(t, f"{p}.mlp", config)


def _audio_tower(t: Tensors, name: str, config: Config) -> None:
    width, inner, small = config["d_model"], config["encoder_ffn_dim"], config["downsample_hidden_size"]
    for number, channels in ((1, 1), (2, small), (3, small)):
        t.add(f"{name}.conv2d{number}.weight", small, channels, 3, 3)
        t.add(f"{name}.conv2d{number}.bias", small)
    bins = ((config["num_mel_bins"] + 1) // 2 + 1) // 2
    t.linear(f"{name}.conv_out", width, small * ((bins + 1) // 2))
    for layer in range(config["encoder_layers"]):
        p = f"{name}.layers.{layer}"
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            t.linear(f"{p}.self_attn.{projection}", width, width, bias=True)
        t.norms(p, ("self_attn_layer_norm", "final_layer_norm"), width, bias=True)
        t.linear(f"{p}.fc1", inner, width, bias=True)
        t.linear(f"{p}.fc2", width, inner, bias=True)
    t.norm(f"{name}.ln_post", width, bias=True)
    t.linear(f"{name}.proj1", width, width, bias=True)
    t.linear(f"{name}.proj2", config["output_dim"], width, bias=True)


def _vision_tower(t: Tensors, name: str, config: Config) -> None:
    hidden, inner, patch = config["hidden_size"], config["intermediate_size"], config["patch_size"]
    wide = config["spatial_merge_size"] ** 2 * hidden
    t.add(f"{name}.patch_embed.proj.weight", hidden, 3, config["temporal_patch_size"], patch, patch)
    t.add(f"{name}.patch_embed.proj.bias", hidden)
    t.add(f"{name}.pos_embed.weight", config["num_position_embeddings"], hidden)
    for block in range(config["depth"]):
        p = f"{name}.blocks.{block}"
        t.norms(p, ("norm1", "norm2"), hidden, bias=True)
        t.linear(f"{p}.attn.qkv", 3 * hidden, hidden, bias=True)
        t.linear(f"{p}.attn.proj", hidden, hidden, bias=True)
        t.linear(f"{p}.mlp.linear_fc1", inner, hidden, bias=True)
        t.linear(f"{p}.mlp.linear_fc2", hidden, inner, bias=True)
    deep = [f"merger_list.{number}" for number in range(len(config["deepstack_visual_indexes"]))]
    for merger in ["merger", *deep]:
        t.norm(f"{name}.{merger}.ln_q", wide if merger in deep else hidden, bias=True)
        t.linear(f"{name}.{merger}.mlp.0", wide, wide, bias=True)
        t.linear(f"{name}.{merger}.mlp.2", config["out_hidden_size"], wide, bias=True)


def _talker(t: Tensors, name: str, config: Config) -> None:
    text, predictor = config["text_config"], config["code_predictor_config"]
    hidden, thinker = text["hidden_size"], config["thinker_hidden_size"]
    _decoder(t, f"{name}.model", text)
    t.norm(f"{name}.model.norm", hidden)
    t.add(f"{name}.model.codec_embedding.weight", text["vocab_size"], hidden)
    t.linear(f"{name}.codec_head", text["vocab_size"], hidden)
    for projection in ("text_projection", "hidden_projection"):
        t.linear(f"{name}.{projection}.linear_fc1", text["intermediate_size"], thinker, bias=True)
        t.linear(f"{name}.{projection}.linear_fc2", hidden, text["intermediate_size"], bias=True)
    code = f"{name}.code_predictor"
    for layer in range(predictor["num_hidden_layers"]):
        p = f"{code}.model.layers.{layer}"
        t.norms(p, NORMS, predictor["hidden_size"])
        attention(t, f"{p}.self_attn", predictor)
        qk_norms(t, f"{p}.self_attn", head_dim(predictor))
        t.mlp(f"{p}.mlp", predictor["hidden_size"], predictor["intermediate_size"])
    t.norm(f"{code}.model.norm", predictor["hidden_size"])
    for group in range(config["num_code_groups"] - 1):
        t.add(f"{code}.model.codec_embedding.{group}.weight", predictor["vocab_size"], hidden)
        t.linear(f"{code}.lm_head.{group}", predictor["vocab_size"], hidden)


def _vocoder(t: Tensors, name: str, config: Config) -> None:
    hidden = config["hidden_size"]
    t.add(f"{name}.code_embedding.weight", config["codebook_size"] * config["num_quantizers"], hidden)
    for layer in range(config["num_hidden_layers"]):
        p = f"{name}.pre_transformer.layers.{layer}"
        t.norms(p, NORMS, hidden)
        attention(t, f"{p}.self_attn", config)
        t.mlp(f"{p}.mlp", hidden, config["intermediate_size"])
        t.add(f"{p}.self_attn_layer_scale.scale", hidden)
        t.add(f"{p}.mlp_layer_scale.scale", hidden)
    t.norm(f"{name}.pre_transformer.norm", hidden)
    for number, ratio in enumerate(config["upsampling_ratios"]):
        p = f"{name}.upsample.{number}"
        t.add(f"{p}.0.conv.weight", hidden, hidden, ratio)
        t.add(f"{p}.0.conv.bias", hidden)
        t.add(f"{p}.1.gamma", hidden)
        _convolution(t, f"{p}.1.dwconv", hidden, 1, 7)
        t.norm(f"{p}.1.norm", hidden, bias=True)
        t.linear(f"{p}.1.pwconv1", 4 * hidden, hidden, bias=True)
        t.linear(f"{p}.1.pwconv2", hidden, 4 * hidden, bias=True)
    _wave_decoder(t, f"{name}.decoder", config)


def _convolution(t: Tensors, name: str, rows: int, columns: int, kernel: int) -> None:
    t.add(f"{name}.conv.weight", rows, columns, kernel)
    t.add(f"{name}.conv.bias", rows)


def _snake(t: Tensors, name: str, width: int) -> None:
    """A periodic activation with two numbers per channel."""
    t.add(f"{name}.alpha", width)
    t.add(f"{name}.beta", width)


def _wave_decoder(t: Tensors, name: str, config: Config) -> None:
    """From hidden states to sound: each block halves the channels."""
    width = config["decoder_dim"]
    _convolution(t, f"{name}.0", width, config["hidden_size"], 7)
    for number, rate in enumerate(config["upsample_rates"], 1):
        p, half = f"{name}.{number}.block", width // 2
        _snake(t, f"{p}.0", width)
        t.add(f"{p}.1.conv.weight", width, half, 2 * rate)
        t.add(f"{p}.1.conv.bias", half)
        for unit in (2, 3, 4):
            _snake(t, f"{p}.{unit}.act1", half)
            _convolution(t, f"{p}.{unit}.conv1", half, half, 7)
            _snake(t, f"{p}.{unit}.act2", half)
            _convolution(t, f"{p}.{unit}.conv2", half, half, 1)
        width = half
    last = len(config["upsample_rates"]) + 1
    _snake(t, f"{name}.{last}", width)
    _convolution(t, f"{name}.{last + 1}", 1, width, 7)


TINY_TALKER: dict[str, Any] = {
    "accept_hidden_layer": 1,
    "num_code_groups": 3,
    "thinker_hidden_size": 40,
    "code_predictor_config": {
        "head_dim": 8,
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_attention_heads": 2,
        "num_code_groups": 3,
        "num_hidden_layers": 1,
        "num_key_value_heads": 1,
        "vocab_size": 32,
        "layer_types": ["full_attention"],
    },
    "text_config": {
        "head_dim": 8,
        "hidden_size": 24,
        "intermediate_size": 20,
        "moe_intermediate_size": 12,
        "num_attention_heads": 2,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 1,
        "num_key_value_heads": 1,
        "rope_scaling": {"mrope_section": [2, 1, 1]},
        "shared_expert_intermediate_size": 12,
        "vocab_size": 48,
    },
}
TINY_THINKER: dict[str, Any] = {
    "audio_end_token_id": 61,
    "audio_start_token_id": 62,
    "audio_token_id": 63,
    "image_token_id": 64,
    "video_token_id": 65,
    "vision_end_token_id": 66,
    "vision_start_token_id": 67,
    "audio_config": {
        "d_model": 16,
        "downsample_hidden_size": 8,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 20,
        "encoder_layers": 1,
        "num_hidden_layers": 1,
        "num_mel_bins": 16,
        "output_dim": 40,
    },
    "vision_config": {
        "deepstack_visual_indexes": [0, 1, 2],
        "depth": 3,
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_heads": 2,
        "num_position_embeddings": 16,
        "out_hidden_size": 40,
        "patch_size": 4,
    },
}

CHECKPOINTS = (
    Checkpoint(
        repo="Qwen/Qwen3-Omni-30B-A3B-Instruct",
        tensors=qwen3_omni,
        billions=35.3,
        tiny={
            "code2wav_config": {
                "codebook_size": 16,
                "decoder_dim": 32,
                "hidden_size": 16,
                "intermediate_size": 20,
                "num_attention_heads": 2,
                "num_hidden_layers": 1,
                "num_key_value_heads": 2,
                "num_quantizers": 3,
                "upsample_rates": [2],
                "upsampling_ratios": [2],
            },
            "talker_config": TINY_TALKER,
            "thinker_config": TINY_THINKER,
        },
    ),
)
