"""GLM-4.5 to GLM-5."""

from published.checkpoint import Checkpoint
from published.collector import NORMS, Config, Tensors, attention, embeddings, head_dim
from published.deepseek import deepseek, second_token, sparse_block


def glm4_moe(t: Tensors, config: Config, prefix: str = "model.", *, shares: bool = False) -> None:
    """GLM-4.5 and 4.6: biases in attention, experts as in DeepSeek-V3, one layer more for a second token.

    Args:
        t: Where to.
        config: That of the language model.
        prefix: Of its modules.
        shares: Whether the last layer uses the embedding and the head of the model.
    """
    embeddings(t, config, prefix)
    depth, predictors = config["num_hidden_layers"], config.get("num_nextn_predict_layers") or 0
    for layer in range(depth + predictors):
        p = f"{prefix}layers.{layer}"
        t.norms(p, NORMS, config["hidden_size"])
        attention(t, f"{p}.self_attn", config, bias=True)
        if config.get("use_qk_norm"):
            t.norm(f"{p}.self_attn.q_norm", head_dim(config))
            t.norm(f"{p}.self_attn.k_norm", head_dim(config))
        if layer < config["first_k_dense_replace"]:
            t.mlp(f"{p}.mlp", config["hidden_size"], config["intermediate_size"])
        else:
            sparse_block(t, f"{p}.mlp", config)
        if layer >= depth:
            second_token(t, p, config, shares=shares)


def glm4_6(t: Tensors, config: Config) -> None:
    """GLM-4.6: its last layer has neither an embedding nor a head."""
    glm4_moe(t, config, shares=True)


CHECKPOINTS = (
    Checkpoint(repo="zai-org/GLM-4.5-Air", tensors=glm4_moe, billions=110.5),
    Checkpoint(repo="zai-org/GLM-4.6", tensors=glm4_6, billions=356.8),
    Checkpoint(
        repo="zai-org/GLM-4.7-Flash",
        tensors=deepseek,
        billions=31.2,
        tiny={"num_key_value_heads": 4, "qk_rope_head_dim": 8, "head_dim": 8},
    ),
    Checkpoint(
        repo="zai-org/GLM-5",
        tensors=deepseek,
        billions=753.9,
        tiny={"num_key_value_heads": 4, "mlp_layer_types": ["dense", "sparse"], "index_head_dim": 8, "head_dim": 4},
    ),
)
