"""Encoder-decoder models with experts in both stacks: Switch Transformers and NLLB-MoE."""

from published.checkpoint import Checkpoint
from published.collector import Config, Tensors


def switch_transformers(t: Tensors, config: Config) -> None:
    """T5's names; every second layer of both stacks has experts of ``wi`` and ``wo``. The embedding is stored once."""
    hidden, inner = config["d_model"], config["d_ff"]
    heads = config["num_heads"] * config["d_kv"]
    t.add("shared.weight", config["vocab_size"], hidden)
    stacks = (
        ("encoder", config["num_layers"], config["num_sparse_encoder_layers"], ("SelfAttention",)),
        (
            "decoder",
            config["num_decoder_layers"],
            config["num_sparse_decoder_layers"],
            ("SelfAttention", "EncDecAttention"),
        ),
    )
    for stack, layers, sparse, attentions in stacks:
        for layer in range(layers):
            p = f"{stack}.block.{layer}.layer"
            for number, attention in enumerate(attentions):
                for name in ("q", "k", "v"):
                    t.linear(f"{p}.{number}.{attention}.{name}", heads, hidden)
                t.linear(f"{p}.{number}.{attention}.o", hidden, heads)
                t.norm(f"{p}.{number}.layer_norm", hidden)
            if layer == 0:
                buckets = config["relative_attention_num_buckets"]
                t.add(f"{p}.0.SelfAttention.relative_attention_bias.weight", buckets, config["num_heads"])
            mlp = f"{p}.{len(attentions)}.mlp"
            t.norm(f"{p}.{len(attentions)}.layer_norm", hidden)
            step = layers // sparse
            if layer % step == 1 or step == 1:
                t.linear(f"{mlp}.router.classifier", config["num_experts"], hidden)
                for expert in range(config["num_experts"]):
                    t.mlp(f"{mlp}.experts.expert_{expert}", hidden, inner, ("", "wi", "wo"))
            else:
                t.mlp(mlp, hidden, inner, ("", "wi", "wo"))
        t.norm(f"{stack}.final_layer_norm", hidden)


def nllb_moe(t: Tensors, config: Config) -> None:
    """M2M100's names, with biases everywhere; every fourth layer of both stacks has experts of ``fc1`` and ``fc2``."""
    hidden = config["d_model"]
    t.add("model.shared.weight", config["vocab_size"], hidden)
    for stack, attentions in (("encoder", ("self_attn",)), ("decoder", ("self_attn", "cross_attention"))):
        inner = config[f"{stack}_ffn_dim"]
        for layer in range(config[f"{stack}_layers"]):
            p = f"model.{stack}.layers.{layer}"
            for attention in attentions:
                for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
                    t.linear(f"{p}.{attention}.{name}", hidden, hidden, bias=True)
                t.norm(f"{p}.{attention}_layer_norm", hidden, bias=True)
            t.norm(f"{p}.ff_layer_norm", hidden, bias=True)
            is_sparse = (layer + 1) % config[f"{stack}_sparse_step"] == 0
            if is_sparse:
                t.linear(f"{p}.ffn.router.classifier", config["num_experts"], hidden)
            experts = [f".experts.expert_{expert}" for expert in range(config["num_experts"])] if is_sparse else [""]
            for expert in experts:
                t.linear(f"{p}.ffn{expert}.fc1", inner, hidden, bias=True)
                t.linear(f"{p}.ffn{expert}.fc2", hidden, inner, bias=True)
        t.norm(f"model.{stack}.layer_norm", hidden, bias=True)


SWITCH_BILLIONS = {8: 0.62, 16: 1.07, 32: 1.98, 64: 3.79, 128: 7.41, 256: 14.7}
# Layers of the tiny checkpoints: dense and sparse ones in both stacks.
TINY_SWITCH = {
    "d_model": 40,
    "d_ff": 56,
    "d_kv": 8,
    "num_heads": 4,
    "num_layers": 4,
    "num_decoder_layers": 2,
    "num_sparse_encoder_layers": 2,
    "num_sparse_decoder_layers": 1,
}
TINY_NLLB = {
    "d_model": 40,
    "encoder_ffn_dim": 56,
    "decoder_ffn_dim": 56,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_layers": 4,
    "decoder_layers": 2,
    "encoder_sparse_step": 2,
    "decoder_sparse_step": 2,
    "num_hidden_layers": 4,
}

CHECKPOINTS = (
    *(
        Checkpoint(
            repo=f"google/switch-base-{experts}",
            tensors=switch_transformers,
            billions=billions,
            dtype="F32",
            layers=4,
            tiny=TINY_SWITCH,
        )
        for experts, billions in SWITCH_BILLIONS.items()
    ),
    Checkpoint(repo="facebook/nllb-moe-54b", tensors=nllb_moe, billions=54.5, dtype="F32", layers=4, tiny=TINY_NLLB),
)
