"""What models cost to run before and after a conversion: the table of ``hcsmoe evaluate --cost``, next to hand counts.

Run: python benchmarks/cost.py --json cost.json BASE:RESULT [BASE:RESULT ...]

FLOPs of Mixtral and Qwen2-MoE are counted by hand as well, from the config alone. Figures of time are those of one
machine: run it where nothing else does.
"""

import argparse
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hcsmoe_hub.cli.libraries import prepare_libraries
from hcsmoe_hub.evaluation.cost_options import CostOptions
from hcsmoe_hub.evaluation.cost_rows import cost_notes, cost_rows
from hcsmoe_hub.evaluation.evaluate import evaluate
from hcsmoe_hub.evaluation.options import EvaluateOptions


def by_hand(config: dict[str, Any], context: int) -> dict[str, float] | None:
    """FLOPs of one token of a Mixtral or a Qwen2-MoE without windows; ``None`` for other models."""
    if config["model_type"] not in ("mixtral", "qwen2_moe"):
        return None
    hidden, heads, groups = (config[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    width = config.get("head_dim") or hidden // heads
    experts = config.get("num_local_experts") or config["num_experts"]
    expert = config.get("moe_intermediate_size") or config["intermediate_size"]
    shared = config.get("shared_expert_intermediate_size", 0)
    block = hidden * experts + config["num_experts_per_tok"] * 3 * hidden * expert
    block += 3 * hidden * shared + (hidden if shared else 0)
    layers = config["num_hidden_layers"]
    linear = 2 * (layers * (2 * hidden * width * (heads + groups) + block) + hidden * config["vocab_size"])
    per_key = layers * 4 * heads * width
    return {"prefill": linear + per_key * (context + 1) / 2, "decode": linear + per_key * (context + 1)}


def compare(base: Path, result: Path, options: CostOptions) -> dict[str, Any]:
    """The cost of a result and of its base, with the hand counts of both."""
    with TemporaryDirectory() as folder:
        wanted = EvaluateOptions(base=base, cost=options, output=Path(folder) / "cost.json")
        document, _ = evaluate(result, wanted)
    measure: dict[str, Any] = document["measures"]["cost"]
    measure["base_model"] = base.name
    for side, path in (("base", base), ("model", result)):
        hand = by_hand(json.loads((path / "config.json").read_text("utf-8")), measure["settings"]["prompt_tokens"])
        measure[side]["by_hand"] = hand
    return measure


def show(measure: Any) -> None:
    """Prints the table, and by how much the counts differ from those by hand."""
    for row in cost_rows(measure):
        print("  ".join((row.name.ljust(34), row.base.rjust(26), row.model.rjust(26), row.ratio.rjust(6))))
    for side in ("base", "model"):
        for part, flops in (measure[side]["by_hand"] or {}).items():
            counted = measure[side][f"{part}_flops"]
            print(f"{part} of {side}: {counted:,} counted, {flops:,.0f} by hand, {100 * (counted / flops - 1):+.3f} %")
    for note in cost_notes(measure):
        print(note)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pairs", nargs="+", metavar="BASE:RESULT")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--prompt-tokens", type=int, default=CostOptions().prompt_length)
    parser.add_argument("--new-tokens", type=int, default=CostOptions().new_tokens)
    parser.add_argument("--repetitions", type=int, default=CostOptions().repetitions)
    wanted = parser.parse_args()
    prepare_libraries()
    options = CostOptions(
        prompt_tokens=wanted.prompt_tokens, new_tokens=wanted.new_tokens, repetitions=wanted.repetitions
    )
    found: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "models": {}}
    for pair in wanted.pairs:
        base, result = map(Path, pair.split(":"))
        print(f"\n{base.name} and {result.name}")
        measure = compare(base, result, options)
        show(measure)
        found["models"][result.name] = measure
        if wanted.json is not None:
            wanted.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
