"""Hidden states of a run as members of a statistics file: no more than one micro-batch is in memory twice.

B sequences, S tokens each, H hidden size.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from hcsmoe_hub.observation.statistics import Call

_INPUT, _NAMED_INPUT = "input.", "named_input."
# Marks an input that was None.
_NONE = "none_"
_OUTPUT = "output"
_MOST_INPUTS = 100
# Tokens of a member that holds a part of a layer's output.
_PART_TOKENS = 8192


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerStates:
    """What passed one MoE layer of the source, in the dtype that it was computed in.

    Attributes:
        calls: Inputs of its block, one per micro-batch.
        output_BSH: Hidden states that left the layer. Some architectures have dimensions between S and H.
    """

    calls: list[Call]
    output_BSH: Tensor


def call_tensors(call: Call) -> dict[str, Tensor]:
    """The inputs of a block as named tensors, none of which shares memory with another."""
    inputs: dict[str, Any] = {f"{_INPUT}{number}": value for number, value in enumerate(call.args)}
    inputs |= {f"{_NAMED_INPUT}{name}": value for name, value in call.kwargs.items()}
    tensors = {}
    for name, value in inputs.items():
        if value is None:
            tensors[f"{_NONE}{name}"] = torch.empty(0)
        else:
            tensors[name] = value.clone(memory_format=torch.contiguous_format)
    return tensors


def call_of(tensors: Mapping[str, Tensor]) -> Call:
    """Inverse of ``call_tensors``; other tensors are ignored.

    Raises:
        ValueError: If the name of an input is not one.
    """
    inputs: dict[str, Any] = dict(tensors)
    inputs |= {name.removeprefix(_NONE): None for name in tensors if name.startswith(_NONE)}
    numbers = [int(name.removeprefix(_INPUT)) for name in inputs if name.startswith(_INPUT)]
    if not all(0 <= number < _MOST_INPUTS for number in numbers):
        raise ValueError("an input of the block has a number that no block has")
    # Earlier versions leave out an input that was None.
    args = [inputs.get(f"{_INPUT}{number}") for number in range(max(numbers, default=-1) + 1)]
    kwargs = {name.removeprefix(_NAMED_INPUT): inputs[name] for name in inputs if name.startswith(_NAMED_INPUT)}
    return Call(tuple(args), kwargs)


def members_of(layer: int, states: LayerStates) -> Iterator[tuple[str, bytes]]:
    """Name and content of every member that holds a part of a layer's states."""
    for number, call in enumerate(states.calls):
        yield _call_name(layer, number), save(call_tensors(call))
    rows = max(1, _PART_TOKENS // states.output_BSH.shape[1])
    for number, part in enumerate(states.output_BSH.split(rows)):
        yield _output_name(layer, number), save({_OUTPUT: part.clone(memory_format=torch.contiguous_format)})


def read_states(layer: int, names: Sequence[str], read: Callable[[str], bytes]) -> LayerStates:
    """Puts the states of a layer together again.

    Args:
        layer: Index of the decoder layer.
        names: Of all members of the file.
        read: Gives the content of one of them.

    Raises:
        KeyError: If a member or a tensor is missing.
        SafetensorError: If one is damaged.
    """
    calls = [_own(load(read(name))) for name in _found(names, lambda number: _call_name(layer, number))]
    parts = [load(read(name))[_OUTPUT] for name in _found(names, lambda number: _output_name(layer, number))]
    return LayerStates(calls=[call_of(tensors) for tensors in calls], output_BSH=torch.cat(parts))


def as_dtype(states: LayerStates, before: torch.dtype, after: torch.dtype) -> LayerStates:
    """States that were computed in one dtype, for a machine that computes in another."""

    def cast(value: Any) -> Any:
        return value.to(after) if isinstance(value, Tensor) and value.dtype == before else value

    calls = [
        Call(tuple(map(cast, call.args)), {name: cast(value) for name, value in call.kwargs.items()})
        for call in states.calls
    ]
    return replace(states, calls=calls, output_BSH=cast(states.output_BSH))


def _own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in memory of torch's own: sums of a matrix product can depend on where its operands begin."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _found(names: Sequence[str], name_of: Callable[[int], str]) -> list[str]:
    """The members that there are under consecutive numbers, one at least."""
    known, found = set(names), [name_of(0)]
    while name_of(len(found)) in known:
        found.append(name_of(len(found)))
    return found


def _call_name(layer: int, number: int) -> str:
    return f"states-{layer}/input-{number}.safetensors"


def _output_name(layer: int, number: int) -> str:
    return f"states-{layer}/output-{number}.safetensors"
