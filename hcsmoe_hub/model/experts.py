"""How one expert computes, whatever its layout: every architecture through the seam that transformers gives it.

E source experts, T tokens, H hidden size, I expert intermediate size, P pre-activations of an expert, K experts per
token. Modules of transformers are typed ``Any``: what they hold depends on the architecture; ``expert_kinds`` lists
those that are understood.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from hcsmoe_hub.methods.merging.neurons import Neurons
from hcsmoe_hub.methods.refit.grouped import ExpertMatrices

# (experts, tokens_TH, top_k_index_TK, top_k_weight_TK) -> routed output [T, H]
Observer = Callable[["Experts", Tensor, Tensor, Tensor], Tensor]


def brought(weight: Tensor, inputs: Tensor) -> Tensor:
    """The weights of one expert in the dtype and on the device of what it is given.

    Experts of a layer may be stored in a narrower dtype than it computes in, and wait on the host for their turn.
    """
    # Pinned memory is copied while the process goes on; what runs on the device next waits for it.
    return weight.to(inputs.device, inputs.dtype, non_blocking=True)


class Experts(ABC):
    """One layer's experts as functions of an expert number and a batch of tokens.

    Args:
        module: The module of transformers that holds their weights, loaded or not.

    Attributes:
        module: That module.
        num_experts: E.
        is_affine: Whether the output is an affine function of the hidden activation. If so, the mean output over tokens
            is the output of the mean activation, and the down projection need not run on every token.
        scales_input: Whether the router weight multiplies the expert's input instead of its output.
    """

    num_experts: int
    is_affine = True
    scales_input = False

    def __init__(self, module: Any) -> None:
        self.module = module

    # Computing

    def hidden(self, expert: int, tokens_TH: Tensor) -> Tensor:
        """Hidden activation ``[T, I]`` after gating, in the dtype of the tokens."""
        return self.gate(self.pre_activation(expert, tokens_TH))

    @property
    def is_silu_gated(self) -> bool:
        """Whether ``gate`` is ``silu(gate) * up`` of the first and the second half of the pre-activations."""
        return False

    @abstractmethod
    def pre_activation(self, expert: int, tokens_TH: Tensor) -> Tensor:
        """Input of the gate or activation function: ``[T, P]``, P = I without a gate and 2I with one."""

    @abstractmethod
    def gate(self, pre_TP: Tensor) -> Tensor:
        """Hidden activation ``[T, I]`` from its pre-activations; every neuron depends on its own ones only."""

    def finish(self, output_RH: Tensor) -> Tensor:
        """What an expert applies to the output of its down projection, before any router weight."""
        return output_RH

    @abstractmethod
    def project(self, expert: int, hidden_TI: Tensor) -> Tensor:
        """Expert output ``[T, H]`` from its hidden activation, computed in the dtype of ``hidden_TI``."""

    # Weights

    @abstractmethod
    def neurons(self, rows: Mapping[str, Tensor]) -> Neurons:
        """Looks at tensors of this layout neuron by neuron; of the module, only its flags are read.

        Args:
            rows: Name relative to the module, such as ``gate_up_proj`` or ``mlp.w1``, to the experts' part of that
                tensor, ``[E, ...]``, as ``ExpertTensor.split`` gives it. Any number of experts.

        Returns:
            Views: writing to them writes to ``rows``.

        Raises:
            UnsupportedModelError: If a tensor belongs to no known part of an expert.
        """

    @abstractmethod
    def matrices(self, rows: Mapping[str, Tensor]) -> ExpertMatrices:
        """Looks at tensors of this layout matrix by matrix; of the module, only its flags are read.

        Args:
            rows: As for ``neurons``; all tensors of the experts.

        Returns:
            Views: writing to them writes to ``rows``.
        """

    # Observing

    @abstractmethod
    def observe(self, block: Any, observer: Observer) -> None:
        """Sends all that the experts compute in their MoE block through an observer, in place of any earlier one."""

    @abstractmethod
    def stop(self, block: Any) -> None:
        """Ends the observation, so that nothing keeps the observer and its tensors alive."""

    @contextmanager
    def observing(self, block: Any, observer: Observer) -> Iterator[None]:
        """Observes the experts inside a ``with`` block; ``observe`` may change the observer meanwhile.

        Args:
            block: The MoE block that the experts belong to.
            observer: What they compute through.
        """
        self.observe(block, observer)
        try:
            yield
        finally:
            self.stop(block)
