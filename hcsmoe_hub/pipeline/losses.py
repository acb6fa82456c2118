"""Predicts what the shapes of experts under a target would lose in each layer, while its weights are in memory."""

from functools import partial

import torch

from hcsmoe_hub.events import Listener, Stage, StageAdvanced
from hcsmoe_hub.layer.context import LayerContext
from hcsmoe_hub.layer.neuron_energies import collect_energies
from hcsmoe_hub.layer.weights import BlockWeights
from hcsmoe_hub.machine.allocator import return_freed_memory
from hcsmoe_hub.methods.clustering import LossTable, loss_table
from hcsmoe_hub.model.expert_kinds import use_probe
from hcsmoe_hub.model.layer_loader import LayerLoader, free
from hcsmoe_hub.model.microbatch import MicroBatcher
from hcsmoe_hub.observation.runnable_block import RunnableBlock
from hcsmoe_hub.observation.statistics_file import StatisticsFile
from hcsmoe_hub.observation.watcher import Observation
from hcsmoe_hub.pipeline.sharding import own_tokens
from hcsmoe_hub.planning.conversion_plan import ConversionPlan


def predict(plan: ConversionPlan, layer: LayerContext, seen: Observation) -> LossTable:
    """What the candidates of a plan lose in a layer whose weights are in memory.

    Args:
        plan: A plan with a target.
        layer: The layer.
        seen: What was observed of its block.
    """
    assert plan.target is not None, "a plan without a target has no candidates"
    with torch.no_grad():
        energies = collect_energies(layer, BlockWeights.of(layer), seen)
    return loss_table(energies, plan.target.experts, plan.target.widths)


def predict_from_statistics(
    plan: ConversionPlan, statistics: StatisticsFile, loader: LayerLoader, device: torch.device, emit: Listener
) -> dict[int, LossTable]:
    """What the candidates lose on the sampled tokens of a statistics file; of a layer, only its router and experts run.

    Args:
        plan: A plan with a target.
        statistics: What an earlier run observed.
        loader: Brings the weights of a layer.
        device: Where layers run.
        emit: Called with progress.
    """
    skeleton, tables = plan.model.skeleton, dict[int, LossTable]()
    use_probe(skeleton.module)
    blocks = {block.layer: block for block in plan.model.blocks}
    make_block = partial(RunnableBlock, skeleton=skeleton, batcher=MicroBatcher(1, 1, device))
    for layer, module in enumerate(skeleton.layers):
        originals = loader.take(layer)
        if layer in blocks:
            found = statistics.layer(layer)
            assert found.sample is not None, "a statistics file holds a sample of every block"
            calls = [own_tokens(found.sample)]
            seen = Observation(statistics=found, calls=calls, top_k=[], outputs=[], domains=("",))
            source = make_block(block=blocks[layer])
            context = LayerContext(source=source, result=None, shape=plan.shape, originals=originals)
            tables[layer] = predict(plan, context, seen)
        emit(StageAdvanced(Stage.OBSERVE, f"layer {layer}"))
        free(module)
        return_freed_memory()
    return tables
