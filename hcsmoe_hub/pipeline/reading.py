"""How a pass over a source reads it: tensors, layers, micro-batches, in the order and the places of the plan."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from hcsmoe_hub.checkpoint.lazy_tensor import OnRead
from hcsmoe_hub.checkpoint.pieces import Step
from hcsmoe_hub.checkpoint.reader import TensorReader
from hcsmoe_hub.events import Listener
from hcsmoe_hub.layer.stored_experts import StoredExperts
from hcsmoe_hub.machine.accelerator import HOST
from hcsmoe_hub.machine.allocator import mapping_large_tensors
from hcsmoe_hub.machine.device import resolve_device
from hcsmoe_hub.model.layer_loader import LayerLoader, StoredForm
from hcsmoe_hub.model.microbatch import MicroBatcher
from hcsmoe_hub.model.transformers_seam import sequential_loading
from hcsmoe_hub.pipeline.stream import make_batcher
from hcsmoe_hub.planning.conversion_plan import ConversionPlan


def batcher_for(plan: ConversionPlan, token_ids: Tensor) -> MicroBatcher:
    """What cuts sequences ``[B, S]`` into micro-batches, where a plan's layers run, and keeps what it plans to keep."""
    device = resolve_device(plan.options.device)
    home = device if plan.keeps_states_on_device else HOST
    return make_batcher(plan.model.skeleton, token_ids, batch_tokens=plan.batch_tokens, device=device, home=home)


def remaining(plan: ConversionPlan, steps: Sequence[Step], last: int) -> list[Step]:
    """What a pass reads that goes on behind a layer, so that nothing else is downloaded.

    Args:
        plan: The conversion.
        steps: What a whole pass reads.
        last: The last layer that is done; -1 if none is.
    """
    keys = plan.model.stored_keys
    done = {key for layer in keys if layer is not None and layer <= last for key in keys[layer]}
    return [[tensor for tensor in step if tensor.name not in done] for step in steps]


@contextmanager
def open_reader(plan: ConversionPlan, steps: Sequence[Step], emit: Listener) -> Iterator[TensorReader]:
    """Reads the source in the order of a pass, whose shards are downloaded ahead of it."""
    source = plan.model.source
    with (
        source.feed(steps, low_disk=plan.options.low_disk, emit=emit) as feed,
        TensorReader(source, feed=feed, emit=emit) as reader,
    ):
        yield reader


@contextmanager
def open_loader(
    plan: ConversionPlan, reader: TensorReader, batcher: MicroBatcher, on_read: OnRead = lambda *read: None
) -> Iterator[LayerLoader]:
    """Loads the layers of the source."""
    model = plan.model
    routers = {tensor.name for block in model.blocks for tensor in block.router}
    tables = {name for block in model.blocks for name in block.tables}
    experts = {tensor.name for block in model.blocks for tensor in block.experts}
    with mapping_large_tensors(), sequential_loading():
        loader = LayerLoader(
            model.skeleton,
            model.placement,
            reader,
            device=batcher.device,
            stored=StoredForm(copies=routers | tables, experts=experts, experts_on_host=plan.experts_on_host),
            on_read=on_read,
        )
        try:
            yield loader
        finally:
            loader.close()


def stored_experts(plan: ConversionPlan) -> StoredExperts:
    """What rounds experts to the format of a plan's source, if the result keeps that."""
    model = plan.model
    experts = {tensor.name for block in model.blocks for tensor in block.experts} if plan.keeps_format else set()
    return StoredExperts(model.tensors, model.groups, frozenset(experts))
