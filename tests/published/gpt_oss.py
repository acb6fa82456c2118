"""gpt-oss, whose experts are stored as MXFP4."""

from published.checkpoint import Checkpoint
from published.collector import NORMS, Config, Tensors, attention, embeddings

# Numbers that share a scale; two of them fit into a byte.
BLOCK = 32


def gpt_oss(t: Tensors, config: Config) -> None:
    """gpt-oss: biases everywhere, attention sinks, experts as blocks of 16 bytes with one exponent each."""
    hidden, experts, inner = config["hidden_size"], config["num_local_experts"], config["intermediate_size"]
    embeddings(t, config)
    for layer in range(config["num_hidden_layers"]):
        p = f"model.layers.{layer}"
        t.norms(p, NORMS, hidden)
        attention(t, f"{p}.self_attn", config, bias=True, o_bias=True)
        t.add(f"{p}.self_attn.sinks", config["num_attention_heads"])
        t.linear(f"{p}.mlp.router", experts, hidden, bias=True)
        for name, rows, columns in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
            projection = f"{p}.mlp.experts.{name}"
            t.add(f"{projection}_blocks", experts, rows, columns // BLOCK, BLOCK // 2, dtype="U8")
            t.add(f"{projection}_scales", experts, rows, columns // BLOCK, dtype="U8")
            t.add(f"{projection}_bias", experts, rows)


ORIGINAL: dict[str, str | int] = {
    "original/config.json": "{}",
    "original/model.safetensors": 13_761_300_984,
    "metal/model.bin": 13_750_886_400,
}
# Multiples of a block, but not of each other.
ODD = {"hidden_size": 96, "intermediate_size": 64}

CHECKPOINTS = (
    Checkpoint(repo="openai/gpt-oss-20b", tensors=gpt_oss, billions=20.9, files=ORIGINAL, tiny=ODD),
    Checkpoint(repo="openai/gpt-oss-120b", tensors=gpt_oss, billions=116.8, files=ORIGINAL, tiny=ODD),
)
