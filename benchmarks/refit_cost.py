"""What the refits of one layer cost, measured on a synthetic Mixtral layer and counted for any size.

Run: python benchmarks/correction_cost.py [--hidden 1024] [--intermediate 3584] [--tokens 16384] [--json FILE]
     python benchmarks/correction_cost.py --model FOLDER [FOLDER ...]

The second form merges half of the experts of real models on 65,536 tokens, with and without a router fit and fitted
down projections, and says how much longer the pass over the layers takes with them.

The layer is random: N experts, the first K of which are kept and fitted to the output of all. Times are ratios to the
calibration pass over the same layer (all experts on all tokens, plus the routed sum), measured in the same run. The
arithmetic is counted by the same formulas for the measured layer and for one of Mixtral-8x7B.
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from hcsmoe_hub import CalibrationOptions, ConvertOptions, MethodOptions, Preset, convert
from hcsmoe_hub.hub.open import open_source
from hcsmoe_hub.methods.refit.cost import FittedLayer
from hcsmoe_hub.methods.refit.down_projections import fit_down
from hcsmoe_hub.methods.refit.experts import STEP_TOKENS, fit_experts
from hcsmoe_hub.model.expert_kinds import PROBE, experts_of, register_probe
from hcsmoe_hub.model.source_model import read_model
from hcsmoe_hub.observation.observers import CalibrationObserver, SampleObserver
from hcsmoe_hub.observation.sample import NeuronSample
from hcsmoe_hub.observation.statistics import ExpertStatistics
from hcsmoe_hub.options import Refit, RouterPolicy

EXPERTS, KEPT, TOP_K = 8, 4, 2
REAL_TOKENS, REAL_LENGTH = 65536, 512
MIXTRAL = {"hidden": 4096, "intermediate": 14336, "tokens": 131072}


def calibration_flops(hidden: int, intermediate: int, tokens: int) -> float:
    """Every expert's hidden activation on every token, and the down projections of the routed ones."""
    return 2.0 * tokens * hidden * intermediate * (2 * EXPERTS + TOP_K)


def memory_bytes(hidden: int, intermediate: int, tokens: int) -> float:
    """Fitted experts, inputs, targets and residuals in float32; one Gram matrix and its factor in float64."""
    step = min(tokens, STEP_TOKENS) * TOP_K / KEPT * intermediate * 4 * 8
    return 12.0 * KEPT * intermediate * hidden + 4 * 4 * tokens * hidden + 3 * 8 * intermediate**2 + step


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=3584)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--model", type=Path, nargs="+")
    parser.add_argument("--json", type=Path)
    wanted = parser.parse_args()
    if wanted.model is not None:
        for model in wanted.model:
            print(f"{model.name}: router fit and down take {added_time(model):.1f} times as long as the pass without")
        return
    sizes = {name: getattr(wanted, name) for name in MIXTRAL}
    seconds = measure(**sizes)
    for name in ("down", "experts"):
        print(f"{name}: {seconds[name] / seconds['calibration']:.1f} times the calibration pass")
    counted = {}
    for label, size in (("measured", sizes), ("Mixtral-8x7B", MIXTRAL)):
        layer = FittedLayer(
            hidden=size["hidden"],
            neurons=size["intermediate"],
            experts=KEPT,
            top_k=TOP_K,
            tokens=size["tokens"],
        )
        flops = {"calibration": calibration_flops(**size), "down": layer.down(), "experts": layer.whole()}
        counted[label] = {"sizes": size, "flops": flops, "bytes": memory_bytes(**size)}
        listed = ", ".join(f"{name} {value / 1e12:.1f} TFLOP" for name, value in flops.items())
        print(f"{label}: {listed}; {memory_bytes(**size) / 2**30:.1f} GiB")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory of the process: {peak:.2f} GiB")
    if wanted.json is not None:
        wanted.json.write_text(json.dumps({"seconds": seconds, "counted": counted, "peak_gib": peak}, indent=1) + "\n")


def added_time(model: Path) -> float:
    """Time that the router fit and the down projections add to the pass over the layers, as a share of that pass."""
    published = MethodOptions(preset=Preset.HC_SMOE)
    fitted = replace(published, router=RouterPolicy.FIT, refit=Refit.DOWN)
    return pass_seconds(model, fitted) / pass_seconds(model, published) - 1


def pass_seconds(model: Path, method: MethodOptions) -> float:
    """Seconds of the pass of one conversion, from its report."""
    experts = read_model(open_source(str(model))).settings.experts // 2
    with tempfile.TemporaryDirectory() as folder:
        calibration = CalibrationOptions(samples=REAL_TOKENS // REAL_LENGTH, sequence_length=REAL_LENGTH)
        options = ConvertOptions(
            experts=experts, method=method, calibration=calibration, output=Path(folder) / "result"
        )
        return convert(model, options).timings_seconds["convert"]


@torch.no_grad()
def measure(hidden: int, intermediate: int, tokens: int) -> dict[str, float]:
    """Seconds of the calibration pass, of the down projections alone and of whole experts, for one layer."""
    torch.manual_seed(0)
    register_probe()
    block = _block(hidden, intermediate, EXPERTS)
    kept = _block(hidden, intermediate, KEPT)
    kept.gate.weight.copy_(block.gate.weight[:KEPT])
    kept.experts.gate_up_proj.copy_(block.experts.gate_up_proj[:KEPT])
    kept.experts.down_proj.copy_(block.experts.down_proj[:KEPT])
    states = torch.randn(1, tokens, hidden)
    calibration = CalibrationObserver(ExpertStatistics.empty(EXPERTS))
    routed = SampleObserver()
    seconds = {"calibration": timed(lambda: _run(block, states, calibration))}
    _run(kept, states, routed)
    sample = NeuronSample(
        experts=experts_of(kept.experts),
        tokens_TH=torch.cat(routed.tokens),
        index_TK=torch.cat(routed.top_k).long(),
        weight_TK=torch.cat(routed.weights),
    )
    wanted_TH, down_CIH = torch.cat(calibration.outputs), kept.experts.down_proj.data.movedim(2, 1)
    seconds["down"] = timed(lambda: fit_down(sample, wanted_TH, down_CIH))
    rounds = timed(lambda: list(fit_experts(sample, wanted_TH, down_CIH, seed=0)))
    seconds["experts"] = seconds["down"] + rounds
    return seconds


def _block(hidden: int, intermediate: int, experts: int) -> MixtralSparseMoeBlock:
    config = MixtralConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_local_experts=experts, num_experts_per_tok=TOP_K
    )
    config._experts_implementation = PROBE
    block = MixtralSparseMoeBlock(config)
    for parameter in block.parameters():
        parameter.data.normal_(std=hidden**-0.5)
    return block


def _run(block: MixtralSparseMoeBlock, states: torch.Tensor, observer: SampleObserver | CalibrationObserver) -> None:
    with experts_of(block.experts).observing(block, observer):
        block(states)


if __name__ == "__main__":
    main()
