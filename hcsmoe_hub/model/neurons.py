"""Which row or column of which tensor belongs to which neuron, in every layout that transformers has."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hcsmoe_hub.errors import UnsupportedModelError
from hcsmoe_hub.methods.merging.neurons import Neurons
from hcsmoe_hub.model.blocks import REPORT_HINT


def neurons_of(module: Any, rows: Mapping[str, Tensor]) -> Neurons:
    """Looks at one layer's experts neuron by neuron.

    Args:
        module: The experts module, one for which ``is_experts_module`` holds; only its type and flags are read.
        rows: Name relative to the module, such as ``gate_up_proj`` or ``mlp.w1``, to the experts' part of that tensor,
            ``[E, ...]``, as ``ExpertTensor.split`` gives it. Any number of experts, not only those of the module.

    Returns:
        Views: writing to them writes to ``rows``.

    Raises:
        UnsupportedModelError: If a tensor belongs to no known part of an expert.
    """
    match type(module).__name__:
        case "DbrxExperts":
            # All three are stored [E, I, H].
            return _sort(rows, inputs={"mlp.w1": (1, 1), "mlp.v1": (1, 1)}, outputs={"mlp.w2": 1})
        case "Llama4TextExperts":
            return _sort(rows, inputs={"gate_up_proj": (2, 2)}, outputs={"down_proj": 1})
        case _:
            return _fused(module, rows)


def _fused(module: Any, rows: Mapping[str, Tensor]) -> Neurons:
    """Neurons of the fused experts of ``transformers.integrations.moe``."""
    incoming, parts = ("gate_up_proj", 2) if module.has_gate else ("up_proj", 1)
    across, along = (2, 1) if module.is_transposed else (1, 2)
    return _sort(
        rows,
        inputs={incoming: (across, parts), f"{incoming}_bias": (1, parts)},
        outputs={"down_proj": along},
        others=("down_proj_bias",),
        is_interleaved=not module.is_concatenated,
    )


def _sort(
    rows: Mapping[str, Tensor],
    *,
    inputs: Mapping[str, tuple[int, int]],
    outputs: Mapping[str, int],
    others: tuple[str, ...] = (),
    is_interleaved: bool = False,
) -> Neurons:
    """Assigns every tensor to the part of an expert that it holds.

    Args:
        rows: Tensors by name.
        inputs: Dimension of the neurons and number of matrices that share it, by name.
        outputs: Dimension of the neurons, by name.
        others: Names of tensors without a dimension of neurons.
        is_interleaved: Whether matrices that share a dimension alternate instead of following each other.
    """
    incoming: list[Tensor] = []
    for name, (dim, parts) in inputs.items():
        if name in rows:
            tensor = rows[name].movedim(dim, 1)
            incoming += [tensor[:, part::parts] for part in range(parts)] if is_interleaved else tensor.chunk(parts, 1)
    unknown = sorted(rows.keys() - {*inputs, *outputs, *others})
    if unknown:
        raise UnsupportedModelError(
            f"tensor {unknown[0]} of the experts has no known place in a neuron; "
            "neurons of different experts cannot be matched.",
            hint=REPORT_HINT,
        )
    return Neurons(
        inputs=tuple(incoming),
        outputs=tuple(rows[name].movedim(dim, 1) for name, dim in outputs.items()),
        others=tuple(rows[name] for name in others if name in rows),
    )
