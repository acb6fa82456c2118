"""Measures the ZipIt merge of one layer, activations and correlations included: 60 experts become 30.

Run from the repository root: ``OMP_NUM_THREADS=2 python benchmarks/zipit.py``. Weights are random; with ``--noise`` the
experts of a cluster are noisy copies of one expert, their neurons in random order, which is where ZipIt finds most.
"""

import argparse
import resource
import time

import torch
from transformers import Qwen2MoeConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts

from hcsmoe_hub.methods.clustering import Clusters, Grouping
from hcsmoe_hub.methods.merging import MergeGroups, member_shares, merge_experts
from hcsmoe_hub.model.expert_kinds import experts_of
from hcsmoe_hub.observation.sample import NeuronSample
from hcsmoe_hub.options import Features, Merge, MethodOptions
from hcsmoe_hub.recipe.resolve import resolve

EXPERTS, CLUSTERS = 60, 30
GROUPINGS = {
    "balanced": [expert // 2 for expert in range(EXPERTS)],
    "lopsided": [max(0, expert - EXPERTS + CLUSTERS) for expert in range(EXPERTS)],
}


def layer(clusters: Clusters, arguments: argparse.Namespace) -> Qwen2MoeExperts:
    """Random experts in bf16; with a noise level, members of a cluster are similar."""
    config = Qwen2MoeConfig(
        hidden_size=arguments.hidden, moe_intermediate_size=arguments.intermediate, num_experts=EXPERTS
    )
    module = Qwen2MoeExperts(config)
    neurons = experts_of(module).neurons({name: parameter.data for name, parameter in module.named_parameters()})
    for tensor in (*neurons.inputs, *neurons.outputs):
        tensor.normal_(std=arguments.hidden**-0.5)
        if arguments.noise is not None:
            for members in clusters.members:
                tensor[list(members)] = tensor[members[0]] + arguments.noise * tensor[list(members)]
    for expert in range(EXPERTS):
        neurons.permute(expert, torch.randperm(arguments.intermediate))
    return module.to(torch.bfloat16)


def measure(grouping: str, features: Features, arguments: argparse.Namespace) -> tuple[float, float]:
    """Wall time and total CPU time of one layer, in seconds."""
    torch.manual_seed(0)
    clusters = Clusters.of(GROUPINGS[grouping])
    module = layer(clusters, arguments)
    scores_TE = torch.randn(arguments.tokens, EXPERTS)
    sample = NeuronSample(
        experts=experts_of(module),
        tokens_TH=torch.randn(arguments.tokens, arguments.hidden, dtype=torch.bfloat16),
        index_TK=scores_TE.topk(arguments.top_k).indices,
        weight_TK=torch.ones(arguments.tokens, arguments.top_k),
    )
    recipe = resolve(MethodOptions(merge=Merge.ZIPIT, features=features))
    start, start_cores = time.perf_counter(), time.process_time()
    merge_experts(
        dict(module.named_parameters()),
        experts_of(module).neurons,
        groups=MergeGroups(
            clusters=clusters,
            dominants=[members[0] for members in clusters.members],
            share_EC=member_shares(Grouping(clusters=clusters), Merge.ZIPIT),
        ),
        recipe=recipe,
        sample=sample,
    )
    return time.perf_counter() - start, time.process_time() - start_cores


def main() -> None:
    """Prints one row per grouping and features."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=1024, help="hidden size (default: %(default)s)")
    parser.add_argument("--intermediate", type=int, default=704, help="neurons per expert (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=2048, help="sampled tokens (default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=4, help="experts per token (default: %(default)s)")
    parser.add_argument("--noise", type=float, help="noise on copies of one expert; without it all are independent")
    parser.add_argument("--features", type=Features, choices=list(Features), nargs="+", default=[Features.ACTIVATION])
    parser.add_argument("--groupings", choices=list(GROUPINGS), nargs="+", default=list(GROUPINGS))
    arguments = parser.parse_args()
    print(f"{'grouping':10} {'features':20} {'seconds':>8} {'CPU s':>8} {'peak GB':>8}")
    with torch.no_grad():
        for grouping in arguments.groupings:
            for features in arguments.features:
                seconds, cores = measure(grouping, features, arguments)
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
                print(f"{grouping:10} {features:20} {seconds:8.1f} {cores:8.1f} {peak:8.1f}", flush=True)


if __name__ == "__main__":
    main()
