"""Which row or column of which tensor belongs to which neuron, in every layout that transformers has."""

from collections.abc import Mapping

from torch import Tensor

from hcsmoe_hub.errors import UnsupportedModelError
from hcsmoe_hub.methods.merging.neurons import Neurons
from hcsmoe_hub.model.architectures import REPORT_HINT


def sort_neurons(
    rows: Mapping[str, Tensor],
    *,
    inputs: Mapping[str, tuple[int, int]],
    outputs: Mapping[str, int],
    others: tuple[str, ...] = (),
    is_interleaved: bool = False,
) -> Neurons:
    """Assigns every tensor to the part of an expert that it holds.

    Args:
        rows: Tensors by name, ``[E, ...]`` each.
        inputs: Dimension of the neurons and number of matrices that share it, by name.
        outputs: Dimension of the neurons, by name.
        others: Names of tensors without a dimension of neurons.
        is_interleaved: Whether matrices that share a dimension alternate instead of following each other.

    Returns:
        Views of ``rows``.

    Raises:
        UnsupportedModelError: If a tensor belongs to no known part of an expert.
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
