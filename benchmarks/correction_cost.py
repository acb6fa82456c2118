"""What the refit of one layer costs: counted for layers of known models, and measured on synthetic ones of their width.

Run: python benchmarks/correction_cost.py [--tokens 2048] [--experts 8] [--layer NAME ...] [--json FILE]

Counted is what the plan of a conversion counts: 131,072 calibration tokens, half of the experts left, next to the
calibration pass over the same layer (all experts on all tokens, plus the routed sum). Measured is one pass of Adam over
``--tokens`` tokens through a Mixtral block of random weights that has the hidden size, the neurons and the active
experts of the model, but at most ``--experts`` experts, so that it fits into memory: a matrix product is as wide as
in the model, but fewer experts share the tokens. Products are in the dtype that a conversion would use.
"""

import argparse
import json
import resource
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from hcsmoe_hub.layer.refit_routing import LiveRouting
from hcsmoe_hub.layer.trained_experts import TrainedExperts
from hcsmoe_hub.machine.device import compute_dtype
from hcsmoe_hub.methods.refit.cost import FittedLayer
from hcsmoe_hub.methods.refit.descent import BATCH_TOKENS, Adam, Schedule
from hcsmoe_hub.model.blocks import ExpertTensor, MoEBlock
from hcsmoe_hub.model.expert_kinds import PROBE, experts_of, register_probe
from hcsmoe_hub.observation.statistics import Call

TOKENS = 131072
# Hidden size, neurons of an expert, experts, active experts.
LAYERS = {
    "Mixtral-8x7B": (4096, 14336, 8, 2),
    "Qwen3-30B-A3B": (2048, 768, 128, 8),
    "DeepSeek-V3": (7168, 2048, 256, 8),
}


def counted(name: str) -> dict[str, float]:
    """Operations and bytes of one layer of a model."""
    hidden, neurons, experts, top_k = LAYERS[name]
    layer = FittedLayer(hidden=hidden, neurons=neurons, experts=experts // 2, top_k=top_k, tokens=TOKENS)
    return {
        "calibration": 2.0 * TOKENS * hidden * neurons * (2 * experts + top_k),
        "block": layer.block(),
        "down": layer.down(),
        "bytes": layer.block_bytes(itemsize=2, product_itemsize=2),
    }


def measured(name: str, tokens: int, most_experts: int) -> dict[str, Any]:
    """Seconds of one pass of Adam over some tokens, and of each of its steps."""
    hidden, neurons, experts, top_k = LAYERS[name]
    experts = min(experts // 2, most_experts)
    device, dtype = torch.device("cpu"), compute_dtype(torch.device("cpu"))
    reduced = _reduced(hidden, neurons, experts, min(top_k, experts), device)
    states, wanted_TH = torch.randn(1, tokens, hidden), torch.randn(tokens, hidden)
    trained, router = TrainedExperts(reduced, dtype), reduced.moe.gate.weight.requires_grad_(True)
    parameters = {**trained.parameters, "router": router}
    fan_ins = {parameters[key]: fan_in for key, fan_in in trained.fan_ins().items()} | {router: hidden}
    # A conversion has enough tokens for whole batches.
    schedule = Schedule(tokens=tokens, batch=min(tokens, BATCH_TOKENS), passes=1)
    adam = Adam(fan_ins, schedule)
    start = time.perf_counter()
    with LiveRouting.of(reduced, [Call((states,))]) as routing:
        for number, chosen in enumerate(schedule.batches(0)):
            trained.refresh()
            trained.clear(parameters)
            (trained(routing.route(chosen)) - wanted_TH[chosen]).square().mean().backward()
            adam.step(number)
    seconds = time.perf_counter() - start
    flops = 18.0 * tokens * min(top_k, experts) * neurons * hidden
    return {
        "experts": experts,
        "tokens": tokens,
        "batch": schedule.batch,
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": seconds,
        "gflops_per_second": flops / seconds / 1e9,
    }


def _reduced(hidden: int, neurons: int, experts: int, top_k: int, device: torch.device) -> Any:
    """A block of random weights, as the refit sees it."""
    config = MixtralConfig(
        hidden_size=hidden, intermediate_size=neurons, num_local_experts=experts, num_experts_per_tok=top_k
    )
    config._experts_implementation = PROBE
    root = torch.nn.Module()
    root.moe = moe = MixtralSparseMoeBlock(config).requires_grad_(False)
    for parameter in moe.parameters():
        parameter.normal_(std=hidden**-0.5)
    names = ("moe.experts.gate_up_proj", "moe.experts.down_proj", "moe.gate.weight")
    gate_up, down, gate = (ExpertTensor(name=name, dim=0, rows_per_expert=1, extra_rows=0) for name in names)
    block = MoEBlock(
        layer=0, path="moe", experts_path="moe.experts", experts=(gate_up, down), router=(gate,), tables=()
    )
    return SimpleNamespace(
        skeleton=SimpleNamespace(module=root), block=block, moe=moe, experts=experts_of(moe.experts), device=device
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--tokens", type=int, default=2048, help="0 measures nothing")
    parser.add_argument("--experts", type=int, default=4, help="most experts of a layer that is measured")
    parser.add_argument("--layer", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--json", type=Path)
    wanted = parser.parse_args()
    register_probe()
    found: dict[str, Any] = {}
    for name in wanted.layer:
        costs = counted(name)
        flops = ", ".join(f"{key} {costs[key] / 1e12:.0f} TFLOP" for key in ("calibration", "block", "down"))
        print(f"{name}, {TOKENS} tokens: {flops}; {costs['bytes'] / 2**30:.1f} GiB", flush=True)
        found[name] = {"counted": costs}
        if wanted.tokens:
            run = found[name]["measured"] = measured(name, wanted.tokens, wanted.experts)
            print(
                f"  {run['experts']} experts, {run['tokens']} tokens in batches of {run['batch']}, {run['dtype']}: "
                f"{run['seconds']:.1f} s, {run['gflops_per_second']:.0f} GFLOP/s",
                flush=True,
            )
    print(f"peak memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
    if wanted.json is not None:
        wanted.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
