"""Checkpoints that are refused from their config alone: a few tensors stand for all of them."""

from published.checkpoint import Checkpoint
from published.collector import Config, Tensors


def stub(t: Tensors, config: Config) -> None:
    """The experts of one layer."""
    hidden = config.get("hidden_size") or config["d_model"]
    t.add("model.embed_tokens.weight", config["vocab_size"], hidden)
    t.experts("model.layers.0.mlp.experts", 16, hidden, 256)


# Nothing is checked against the published size: most of the tensors are left out.
UNCOUNTED = 0.0

CHECKPOINTS = tuple(
    Checkpoint(repo=repo, tensors=stub, billions=UNCOUNTED)
    for repo in (
        "inclusionAI/Ling-1T",
        "inclusionAI/Ling-lite-1.5",
        "PowerInfer/SmallThinker-21BA3B-Instruct",
        "llama-moe/LLaMA-MoE-v1-3_5B-4_16",
        "meituan-longcat/LongCat-Flash-Chat",
        "xai-org/grok-2",
    )
)
