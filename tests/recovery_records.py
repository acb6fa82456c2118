"""What ``hcsmoe.json`` says of a training after the conversion, for tests of what reads it."""

from typing import Any

RECOVERY: dict[str, Any] = {
    "teacher": {"repo_id": "acme/Mixtral-tiny", "path": None, "revision": None, "fingerprint": "0" * 64},
    "data": {
        "dataset": "chats.jsonl",
        "dataset_sha256": "1" * 64,
        "text_column": None,
        "sequences": 1900,
        "sequence_length": 512,
        "tokens": 972_800,
        "held_out_tokens": 51_200,
        "sha256": "2" * 64,
        "domains": [],
    },
    "settings": {
        "train": ["router", "experts", "norms"],
        "lora_rank": None,
        "temperature": 2.0,
        "kd_weight": 1.0,
        "text_weight": 0.0,
        "learning_rate": 0.003,
        "batch_tokens": 16384,
        "dtype": "bfloat16",
        "seed": 42,
        "held_out": 0.05,
        "max_steps": None,
        "max_minutes": 60.0,
        "evaluate_every": 50,
        "patience": None,
        "top_logits": 128,
    },
    "kept_step": 450,
    "steps": 512,
    "tokens": 8_388_608,
    "seconds": 3600.5,
    "stopped": "time",
    "trained_parameters": 1_200_000,
    "trained_tensors": 60,
    "before": {"perplexity": 21.5, "kl": 0.875},
    "after": {"perplexity": 16.25, "kl": 0.3125},
    "history": [{"step": 0, "perplexity": 21.5}, {"step": 450, "perplexity": 16.25}],
    "tool_version": "0.1.0",
    "versions": {"python": "3.12.0"},
}
# The same with LoRA and a loss on the text, and one that brought nothing.
LORA = {
    **RECOVERY,
    "settings": {**RECOVERY["settings"], "train": ["lora"], "lora_rank": 8, "text_weight": 0.5, "top_logits": None},
}
NOTHING = {**RECOVERY, "kept_step": 0, "after": RECOVERY["before"]}
