"""One layer at several sizes: what does not depend on the size is found once.

E source experts, K experts of the result, W neurons of each of them.
"""

from dataclasses import dataclass, replace

from torch import Tensor

from hcsmoe_hub.layer.context import LayerContext
from hcsmoe_hub.layer.distances import Comparison
from hcsmoe_hub.layer.neuron_energies import collect_energies
from hcsmoe_hub.layer.reducer import LayerReducer
from hcsmoe_hub.layer.selection import Selection, select_groups
from hcsmoe_hub.layer.weights import BlockWeights
from hcsmoe_hub.methods.clustering import Clusters, Grouping, cut_tree, loss_linkage, pair_losses
from hcsmoe_hub.observation.overflow import check_result
from hcsmoe_hub.observation.watcher import Observation
from hcsmoe_hub.recipe.recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReducedBlock:
    """A block of the result.

    Attributes:
        changed: Its tensors that differ from the source's, by parameter name.
        clusters: Which source experts each of its experts stands for.
    """

    changed: dict[str, Tensor]
    clusters: Clusters


class SharedLayer:
    """What all sizes of a layer have in common: the energies of its neurons, and one tree of experts per width.

    Args:
        layer: The layer; the weights of its block in the source are in memory.
        seen: What was observed of it.

    Attributes:
        weights: Experts and router of the source.
        seen: What was observed of the layer.
        energies: Of its neurons.
    """

    def __init__(self, layer: LayerContext, seen: Observation) -> None:
        self.weights = BlockWeights.of(layer)
        self.seen = seen
        self.energies = collect_energies(layer, self.weights, seen, for_widths=True)
        self._trees: dict[int, tuple[Comparison, Grouping]] = {}

    def compared(self, width: int) -> tuple[Comparison, Grouping]:
        """How experts differ if those of the result have a width W, and the tree of their merges."""
        if width not in self._trees:
            energies = replace(self.energies, width=width)
            compared = Comparison(distances=[pair_losses(energies)], energies=energies)
            self._trees[width] = compared, loss_linkage(energies, 1)
        return self._trees[width]

    def select(self, recipe: Recipe, experts: int, width: int) -> Selection:
        """The K clusters of experts for a width W, cut from the tree."""
        compared, whole = self.compared(width)
        assert whole.tree is not None, "the loss linkage builds a tree"
        return select_groups(recipe, self.seen.statistics, compared, cut_tree(whole.tree, experts))


class PointReducer(LayerReducer):
    """Turns the experts of one layer after another into those of one size, and leaves the layer as it is.

    The recipe has the loss linkage and experts of the best neurons, and refits nothing.
    """

    def reduce_shared(self, layer: LayerContext, shared: SharedLayer) -> ReducedBlock:
        """Reduces one block, with what ``LayerReducer.reduce`` would write.

        Args:
            layer: Its layer; the weights are in memory, and stay there.
            shared: What was found out about it.

        Raises:
            VerificationError: If the source holds weights that are not finite, or values overflow; names the tensor.
        """
        weights, seen = shared.weights, shared.seen
        chosen = shared.select(self._plan.recipe, self._plan.experts, self._plan.width)
        energies = replace(shared.energies, width=self._plan.width)
        merged = self._merge(layer, weights, chosen, seen, None, energies)
        changed = self._lay_out(layer.block, weights, chosen, merged, seen)
        self._fit_router(layer, chosen, changed, seen, seen)
        self._scale(layer, chosen, changed, seen, seen)
        changed |= self._stored.round(layer, changed, self._heritage(chosen)).tensors
        check_result(layer.block.layer, changed)
        return ReducedBlock(changed=changed, clusters=chosen.clusters)
