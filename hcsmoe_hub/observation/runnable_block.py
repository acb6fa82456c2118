"""An MoE block in memory that can be run, alone and under observation."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from accelerate.utils import send_to_device
from torch import nn

from hcsmoe_hub.machine.accelerator import release_unused
from hcsmoe_hub.machine.out_of_memory import is_out_of_memory
from hcsmoe_hub.model.blocks import MoEBlock
from hcsmoe_hub.model.expert_kinds import experts_of
from hcsmoe_hub.model.experts import Experts
from hcsmoe_hub.model.microbatch import MicroBatcher
from hcsmoe_hub.model.skeleton import Skeleton
from hcsmoe_hub.observation.observers import RoutedObserver
from hcsmoe_hub.observation.statistics import Call, halves, takes_tokens

ObserverT = TypeVar("ObserverT", bound=RoutedObserver)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RunnableBlock:
    """The MoE block of one decoder layer, of the source or of the result, its weights in memory.

    Attributes:
        skeleton: The model that it belongs to.
        block: Where it is.
        batcher: Cuts a whole layer's sequences into micro-batches, and knows the device.
    """

    skeleton: Skeleton
    block: MoEBlock
    batcher: MicroBatcher

    @property
    def moe(self) -> nn.Module:
        """The module that holds router and experts."""
        return self.skeleton.module.get_submodule(self.block.path)

    @property
    def experts(self) -> Experts:
        """Its experts."""
        return experts_of(self.skeleton.module.get_submodule(self.block.experts_path))

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.batcher.device

    def runs_on_tokens(self, calls: list[Call]) -> bool:
        """Whether the block can be run on some of the tokens of its inputs, without the others."""
        return not self.block.is_whole_layer and takes_tokens(calls[0])

    def rerun(self, calls: list[Call], make_observer: Callable[[], ObserverT]) -> ObserverT:
        """Runs the block on inputs that it, or the block it stands for, has seen.

        Args:
            calls: Its inputs.
            make_observer: Makes the observer that everything goes through; called once per attempt.

        Returns:
            The observer of the attempt that succeeded.
        """
        moe, experts, found = self.moe, self.experts, list[ObserverT]()

        def start() -> None:
            found[:] = [make_observer()]
            found[0].keep = self.batcher.keep
            experts.observe(moe, found[0])

        try:
            with torch.no_grad():
                self._run_on(calls, start)
        finally:
            experts.stop(moe)
        return found[0]

    def _run_on(self, calls: list[Call], start: Callable[[], None]) -> None:
        """Runs the block alone, on halves of its inputs where memory runs out.

        Args:
            calls: Its inputs.
            start: Called before every attempt.
        """
        if self.block.is_whole_layer:
            for call in calls:
                # The layer's own forward: the one on the instance loads and frees its weights.
                self.batcher.wrap(partial(type(self.moe).forward, self.moe), start)(*call.args, **call.kwargs)
            return
        while True:
            start()
            try:
                for call in calls:
                    self.moe(*send_to_device(call.args, self.device), **send_to_device(call.kwargs, self.device))
                self.batcher.settle()
                return
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or not self.runs_on_tokens(calls):
                    raise
                calls = [half for call in calls for half in halves(call)]
            release_unused(self.device)
