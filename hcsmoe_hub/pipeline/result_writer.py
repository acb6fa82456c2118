"""Writes the layers of a result under the names of the source."""

from collections.abc import Mapping

from torch import Tensor

from hcsmoe_hub.checkpoint.background_writer import BackgroundWriter
from hcsmoe_hub.events import Listener, Stage, StageAdvanced, Warned
from hcsmoe_hub.layer.stored_experts import StoredExperts
from hcsmoe_hub.pipeline.sharding import writes
from hcsmoe_hub.planning.conversion_plan import ConversionPlan


def copied_although(name: str) -> Warned:
    """The warning about a copied tensor that is not finite, which may be meant: a limit may be infinite.

    If any expert depended on it, the conversion would have ended.
    """
    return Warned(f"{name} holds NaN or infinite numbers, which are copied as they are.")


class ResultWriter:
    """Writes what is not simply copied, under the names of the source.

    Args:
        plan: What is written.
        writer: Takes the weights of the result.
        emit: Called when a layer is written.
        stored: Has the experts that are written in the format of the source.
    """

    def __init__(self, plan: ConversionPlan, writer: BackgroundWriter, emit: Listener, stored: StoredExperts) -> None:
        self._plan = plan
        self._writer = writer
        self._emit = emit
        self._stored = stored

    def write(self, layer: int | None, changed: Mapping[str, Tensor]) -> None:
        """Writes one decoder layer, or what lies outside of them.

        Args:
            layer: Its index, its weights in memory; ``None`` outside the layers.
            changed: Tensors that differ from those in memory, by parameter name.
        """
        names = [name for name in self._plan.account.rewritten.get(layer, ()) if not self._stored.holds(name)]
        parts = self._stored.take(layer)
        if not writes(layer):
            names, parts = [], {}
        if names:
            skeleton = self._plan.model.skeleton
            state = skeleton.module.state_dict()
            # Factors take the place of matrices that the model has in memory.
            tensors = {name: changed[name] if name in changed else state[name] for name in names}
            for name, tensor in skeleton.to_stored(tensors, self._plan.model.groups[layer]).items():
                self._writer.write(name, tensor.to(self._plan.shards.tensors[name].dtype))
        for name, part in parts.items():
            self._writer.write(name, part)
        if layer is not None:
            self.warn_of_broken(layer)
        self._writer.share()
        if layer is not None:
            self._emit(StageAdvanced(Stage.CONVERT, f"layer {layer}", self._writer.bytes_taken))

    def warn_of_broken(self, layer: int | None) -> None:
        """Names the tensors of a layer, or outside the layers, that are not finite."""
        for broken in self._plan.model.skeleton.broken.values():
            if broken.layer == layer:
                self._emit(copied_although(broken.name))

    def settle(self) -> None:
        """Waits until the last layer is written: its experts and those that are merged next would add up."""
        self._writer.settle()
