"""Finds which key of a config sets the width of the routed experts, and which tensors follow it.

No key is guessed: the same model is built with experts of twice the width (without weights), and a key is the right one
if all experts grow with it and nothing else does but the shared experts next to them.

E experts, I neurons of each (the expert intermediate size), W neurons of each in the result.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from hcsmoe_hub.checkpoint.config_json import sections, size_keys, with_value
from hcsmoe_hub.checkpoint.modeling_hcsmoe_factored import OUTGOING
from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.model.blocks import ExpertTensor, compare
from hcsmoe_hub.model.expert_kinds import experts_of
from hcsmoe_hub.model.skeleton import Skeleton
from hcsmoe_hub.model.source_model import SourceModel

# Names that sizes of feed-forward networks have.
_WIDTH_KEY = re.compile(r"intermediate|ffn|inner|^d_ff$")
# Those of routed experts: other programs may read them where transformers reads another key.
_ROUTED_KEY = re.compile(r"^(?!.*shared).*(moe|expert)")
# Numbers of shared experts, each as wide as a routed one.
SHARED_KEYS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertWidth:
    """How the width of the routed experts of a model is set.

    Attributes:
        size: I.
        key: Name of the config key that sets it.
        built: Config of the model as transformers builds it.
        tensors: Where the neurons lie in the tensors of the experts that have any, by parameter name;
            ``rows_per_expert`` is the number of entries per neuron.
        shared_key: Name of the key that counts shared experts of the same width; ``None`` if no others share it.
        shared: Their number, 0 without a key.
        aliases: Keys of the config that say the same and that transformers does not read.
        step: What the width must be a multiple of in the format of the source's weights, 1 for any width.
    """

    size: int
    key: str
    built: PreTrainedConfig
    tensors: Mapping[str, ExpertTensor]
    shared_key: str | None = None
    shared: int = 0
    aliases: tuple[str, ...] = ()
    step: int = 1

    def takes(self, width: int) -> bool:
        """Whether shared experts can stay what they are next to routed ones of a width: their number is whole."""
        return not self.shared or self.shared * self.size % width == 0

    def stores(self, width: int) -> bool:
        """Whether the format of the source's weights holds experts of a width."""
        return width % self.step == 0

    def edit(self, config: Mapping[str, Any], width: int) -> dict[str, Any]:
        """A copy of a raw config with routed experts of another width, and shared ones as they are."""
        edited = dict(config)
        for key in (self.key, *self.aliases):
            edited = with_value(edited, self.built, key, self.size, width)
        if self.shared_key is None:
            return edited
        return with_value(edited, self.built, self.shared_key, self.shared, self.shared * self.size // width)


def neurons_of(model: SourceModel) -> int:
    """I, the number of neurons of one routed expert."""
    block = model.blocks[0]
    # Of factored experts [K, 1, R, I].
    factor = model.skeleton.state.get(f"{block.experts_path}.{OUTGOING}_v")
    if factor is not None:
        return factor.shape[-1]
    rows = {
        block.name_in_experts(tensor): tensor.split(model.skeleton.state[tensor.name])[0] for tensor in block.experts
    }
    return experts_of(model.skeleton.module.get_submodule(block.experts_path)).neurons(rows).size


def find_width(model: SourceModel) -> ExpertWidth:
    """Finds the key that sets the width of a model's routed experts.

    Raises:
        PlanError: If none sets it alone, so that experts cannot be narrower without other parts of the model.
    """
    size, problem = neurons_of(model), "no key of its config sets their width alone"
    keys = size_keys(model.source.config, model.skeleton.config, size, _WIDTH_KEY)
    for key in keys:
        found = ExpertWidth(size=size, key=key, built=model.skeleton.text_config, tensors={})
        grown = _state(model, found, 2 * size)
        if grown is None:
            continue
        changed = {name: tensor for name, tensor in model.skeleton.state.items() if tensor.shape != grown[name].shape}
        own = {tensor.name: changed[tensor.name] for tensor in _experts(model) if tensor.name in changed}
        if not own:
            continue
        found = replace(found, tensors=compare(own, grown, experts=size), step=_row_step(model))
        others = changed.keys() - own.keys()
        paths = tuple(f"{block.path}." for block in model.blocks)
        outside = [name for name in others if not name.startswith(paths)]
        partial = next((each for each in model.blocks if not any(tensor.name in own for tensor in each.experts)), None)
        if partial is not None and not outside:
            problem = f"{key} of its config does not set the width of the experts of layer {partial.layer}"
            continue
        if outside:
            problem = f"{key} of its config also sets the size of {min(outside)}"
            continue
        shared = _with_shared(model, found) if others else found
        if shared is not None:
            return replace(shared, aliases=_aliases(model, shared, keys))
        problem = f"{key} of its config also sets the width of the shared expert ({min(others)})"
    raise PlanError(
        f"the experts of {model.source.label} cannot be made narrower: {problem}.",
        hint="leave `expert_width` out and keep fewer `experts`",
    )


def _experts(model: SourceModel) -> list[ExpertTensor]:
    """Tensors of all experts of a model."""
    return [tensor for block in model.blocks for tensor in block.experts]


def _row_step(model: SourceModel) -> int:
    """What the rows of experts must be multiples of in the formats that they are stored in."""
    experts = {tensor.name for tensor in _experts(model)}
    stored = [name for group in model.groups.values() for name, target in group.targets.items() if target in experts]
    codecs = (model.tensors[name].codec for name in stored)
    return math.lcm(*(codec.row_step for codec in codecs if codec is not None))


def _aliases(model: SourceModel, width: ExpertWidth, keys: list[str]) -> tuple[str, ...]:
    """Other names of the width in a raw config: keys of routed experts that set nothing of the model themselves."""
    config, state = model.source.config, model.skeleton.state
    found = []
    for key in keys:
        is_stored = any(key in section for section in sections(config))
        if key == width.key or not is_stored or _ROUTED_KEY.search(key) is None:
            continue
        grown = _state(model, replace(width, key=key, shared_key=None), 2 * width.size)
        if grown is not None and all(grown[name].shape == state[name].shape for name in state):
            found.append(key)
    return tuple(found)


def _with_shared(model: SourceModel, width: ExpertWidth) -> ExpertWidth | None:
    """The same with the key that counts shared experts, if twice as many of half the width are the same tensors."""
    experts = {tensor.name for tensor in _experts(model)}
    for key in SHARED_KEYS:
        count = getattr(width.built, key, None)
        if not isinstance(count, int) or count < 1 or width.size % 2:
            continue
        found = replace(width, shared_key=key, shared=count)
        halved = _state(model, found, width.size // 2)
        state = model.skeleton.state
        if halved is not None and all(name in experts or halved[name].shape == state[name].shape for name in state):
            return found
    return None


def _state(model: SourceModel, width: ExpertWidth, size: int) -> Mapping[str, Tensor] | None:
    """Tensors of the same model with experts of another width; ``None`` if they are other tensors altogether."""
    skeleton = Skeleton(width.edit(model.source.config, size), model.skeleton.dtype, mtp=model.skeleton.mtp)
    return skeleton.state if skeleton.state.keys() == model.skeleton.state.keys() else None
