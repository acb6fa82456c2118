"""LoRA on every matrix of the layers of a model, through peft. R rank."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from hcsmoe_hub.errors import PlanError, UnsupportedModelError
from hcsmoe_hub.model.source_model import SourceModel

_ADAPTER = "default"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Adapter:
    """LoRA on one tensor.

    Attributes:
        tensor: Name of the tensor.
        base: The tensor, which is frozen.
        layer: peft's module.
        factors: The trained factors by name, float32.
    """

    tensor: str
    base: nn.Parameter
    layer: Any
    factors: Mapping[str, nn.Parameter]

    @property
    def delta(self) -> Callable[[], Tensor]:
        """Computes what the factors add to the tensor."""
        return partial(self.layer.get_delta_weight, _ADAPTER)


def check_peft() -> None:
    """Checks that peft is installed.

    Raises:
        PlanError: If it is not.
    """
    if find_spec("peft") is None:
        raise PlanError(
            "`train='lora'` needs peft, which is not installed.",
            hint="install it with: pip install 'hcsmoe[recover]'",
            option="train",
        )


def add_lora(model: SourceModel, *, rank: int, seed: int) -> list[Adapter]:
    """Adds factors to all matrices of the layers, of an encoder as well; at first they change nothing.

    Args:
        model: A loaded model; its frozen tensors keep their dtype.
        rank: R.
        seed: Of the factors' first values.

    Returns:
        One adapter per tensor, in the order of the model.

    Raises:
        PlanError: If peft is not installed.
        UnsupportedModelError: If experts are stored as tensors of another kind than matrices.
    """
    check_peft()
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    module = model.skeleton.module
    linears, others = _targets(model)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    # Tensors of other modules than Linear take neither a dropout nor a bias.
    config = LoraConfig(
        r=rank, lora_alpha=rank, lora_dropout=0.0, bias="none", target_modules=linears, target_parameters=others
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, module)
    module.requires_grad_(False)
    found: list[Adapter] = []
    for path, layer in module.named_modules():
        if isinstance(layer, LoraLayer):
            base: Any = layer.get_param() if hasattr(layer, "get_param") else layer.get_base_layer().weight
            factors = {}
            for kind in ("lora_A", "lora_B"):
                weight = getattr(layer, kind)[_ADAPTER].weight
                weight.data = weight.data.float()
                factors[f"{path}.{kind}"] = weight.requires_grad_(True)
            found.append(Adapter(tensor=names[id(base)], base=base, layer=layer, factors=factors))
    return found


def _targets(model: SourceModel) -> tuple[list[str], list[str]]:
    """Modules and parameters to adapt: the Linear ones, and the matrices of all others, stored ones in either case."""
    skeleton, linears, others = model.skeleton, [], []
    stored = {target for group in model.groups.values() for target in group.targets.values()}
    experts = {tensor.name for block in model.decoder_blocks for tensor in block.experts}
    for path, part in skeleton.module.named_modules():
        for name, parameter in part.named_parameters(recurse=False):
            full = f"{path}.{name}"
            layer = skeleton.layer_of(full)
            if layer is None or layer >= skeleton.depth or full not in stored or not parameter.is_floating_point():
                continue
            if isinstance(part, nn.Embedding):
                # Biases of positions are a table, not a matrix that states are multiplied by.
                continue
            if isinstance(part, nn.Linear):
                linears += [path] if name == "weight" else []
            elif parameter.dim() in (2, 3) and min(parameter.shape) > 1 and not name.endswith("bias"):
                others.append(full)
            elif full in experts and parameter.dim() > 3:
                raise UnsupportedModelError(
                    f"the experts of {model.source.label} are factors already, on which LoRA does not work.",
                    hint="leave `train` out, which trains the factors themselves",
                )
    return linears, others
