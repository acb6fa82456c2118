"""The experts of one reduced block while they are trained.

C experts, T tokens of one step, K experts per token, R rows (one per token and choice, sorted by expert), H hidden
size, P pre-activations and I neurons of an expert.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from hcsmoe_hub.layer.refit_routing import Routed
from hcsmoe_hub.machine import ranks
from hcsmoe_hub.machine.accelerator import is_host
from hcsmoe_hub.methods.refit.grouped import ExpertMatrices, TrainedMatrix, Visits, product, silu_gate
from hcsmoe_hub.methods.refit.sums import sums_of
from hcsmoe_hub.methods.totals import total
from hcsmoe_hub.observation.runnable_block import RunnableBlock

# Grouped products of an accelerator take rows of whole 16 bytes.
ROW_BYTES = 16
# Experts whose pre-activations show whether the first step has the right length.
PROBED_EXPERTS = 4


class TrainedExperts:
    """The experts of a block, their products in a dtype of one's choice, and where their gradients go.

    Args:
        reduced: The block, in float32.
        dtype: Of the products.

    Attributes:
        adds: Whether the next backward pass adds to the gradients that are there, those of other tokens of a step.
        is_grouped: Whether the matrices of all experts are multiplied at once; gradients then take twice the memory.
    """

    def __init__(self, reduced: RunnableBlock, dtype: torch.dtype) -> None:
        self.experts = reduced.experts
        self.dtype = dtype
        self._layout = reduced.block
        self.parameters = {
            tensor.name: reduced.skeleton.module.get_parameter(tensor.name) for tensor in self._layout.experts
        }
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
            parameter.grad = torch.zeros_like(parameter)
        masters = {name: parameter.detach() for name, parameter in self.parameters.items()}
        self._masters = masters
        self._copies = masters if dtype is torch.float32 else {name: p.to(dtype) for name, p in masters.items()}
        values = self._matrices(self._copies)
        gradients = self._matrices({name: _gradient(parameter) for name, parameter in self.parameters.items()})
        # Any one of them: the backward pass only has to come by.
        anchor = next(iter(self.parameters.values()))
        pairs = zip((*values.incoming, values.outgoing), (*gradients.incoming, gradients.outgoing), strict=True)
        *self.incoming, self.outgoing = (
            TrainedMatrix(values_CXY=one, gradient_CXY=other, anchor=anchor) for one, other in pairs
        )
        self._places = self._sorted_names()
        widths = (matrix.values_CXY.shape[dim] * dtype.itemsize for matrix in self.matrices for dim in (1, 2))
        # Those of other dtypes wait for the device once per product, one product after the other once per step.
        is_offered = not is_host(reduced.device) and dtype is torch.bfloat16
        self.is_grouped = is_offered and all(width % ROW_BYTES == 0 for width in widths)
        self.adds = False

    def _matrices(self, tensors: Mapping[str, Tensor]) -> ExpertMatrices:
        rows = {
            self._layout.name_in_experts(tensor): tensor.split(tensors[tensor.name])[0]
            for tensor in self._layout.experts
        }
        return self.experts.matrices(rows)

    def _sorted_names(self) -> tuple[list[str], str]:
        """Names of the parameters that hold the matrices before the gate, and of the one behind it."""
        names = list(self.parameters)
        numbers = self._matrices(
            {name: torch.tensor(place).expand(self.parameters[name].shape) for place, name in enumerate(names)}
        )
        *before, behind = (names[int(view[0, 0, 0])] for view in (*numbers.incoming, numbers.outgoing))
        return before, behind

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.incoming[0].values_CXY.shape[1]

    def fan_ins(self) -> dict[str, int]:
        """Number of inputs behind every parameter, by name; of a bias, those of its matrix."""
        _, behind = self._places
        neurons = self.outgoing.values_CXY.shape[1]
        return {name: neurons if name.startswith(behind) else self.hidden_size for name in self.parameters}

    @property
    def matrices(self) -> list[TrainedMatrix]:
        """All of them: those before the gate, then the one behind it."""
        return [*self.incoming, self.outgoing]

    def refresh(self) -> None:
        """Lets the products see what the parameters have become."""
        if self._copies is not self._masters:
            for name, copy in self._copies.items():
                copy.copy_(self._masters[name])

    def clear(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Forgets the gradients of the last step, but for those that the next one overwrites."""
        self.adds = False
        before, behind = self._places
        for name, parameter in parameters.items():
            if name not in (*before, behind):
                parameter.grad = None

    def change(self, parts: Sequence[Routed], rates: Mapping[str, float]) -> float:
        """What one step along the signs of the gradients would change of the pre-activations, as a share of them.

        Args:
            parts: What reaches the experts, on all ranks together.
            rates: Length of the step in every weight, by name of the parameter.

        Returns:
            Root mean square of the change over that of the pre-activations without biases; 0 where no expert runs.
        """
        device = self.outgoing.values_CXY.device
        visits_C = torch.zeros(self.experts.num_experts, dtype=torch.int64, device=device)
        for routed in parts:
            visits_C += torch.bincount(routed.index_TK.flatten() + 1, minlength=len(visits_C) + 1)[1:]
        ranks.add_up(visits_C)
        changes: list[Tensor] = []
        sizes: list[Tensor] = []
        for expert in visits_C.argsort(descending=True)[:PROBED_EXPERTS].tolist():
            for routed in parts:
                rows_RH = routed.tokens_TH[(routed.index_TK == expert).any(1)].to(self.dtype)
                for name, matrix in zip(self._places[0], self.incoming, strict=True):
                    step_HP = (matrix.gradient_CXY[expert].sign() * rates[name]).to(self.dtype)
                    changes.append(total((rows_RH @ step_HP).float().square()))
                    sizes.append(total((rows_RH @ matrix.values_CXY[expert]).float().square()))
        wrong, size = sums_of([changes, sizes], device)
        return (wrong / size) ** 0.5 if size else 0.0

    def add_up_gradients(self, parameters: Mapping[str, nn.Parameter], *, has_own: bool) -> None:
        """Adds up the gradients of a step over the ranks.

        Args:
            parameters: All that are trained, by name.
            has_own: Whether this rank has any tokens of the step; if not, what its gradients hold is of another step.
        """
        if not ranks.is_shared():
            return
        for parameter in parameters.values():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = ranks.add_up(gradient if has_own else gradient.zero_())

    def visits(self, routed: Routed) -> Visits:
        """The rows of all experts."""
        count = self.experts.num_experts
        visits = (Visits.on_device if self.is_grouped else Visits.on_host)(routed.index_TK, count)
        return replace(visits, adds=self.adds)

    def __call__(self, routed: Routed) -> Tensor:
        """What the experts add up to: ``[T, H]`` float32; differentiable."""
        visits = self.visits(routed)
        biases = self._matrices(self.parameters)
        weight_R1 = visits.weights(routed.weight_TK)
        rows_RH = routed.tokens_TH.to(self.dtype).index_select(0, visits.token_R)
        if self.experts.scales_input:
            rows_RH = rows_RH * weight_R1.to(self.dtype)
        hidden_RI = self._gate(self.pre_activation(visits, rows_RH, biases.incoming_bias))
        output_RH = _plus(product(visits, hidden_RI, self.outgoing), biases.outgoing_bias, visits)
        output_RH = self.experts.finish(output_RH).float()
        # Padding has the weight 0, whether that scales inputs or outputs.
        output_RH = output_RH * ((weight_R1 != 0) if self.experts.scales_input else weight_R1)
        nothing_TH = output_RH.new_zeros(len(routed.tokens_TH), output_RH.shape[1])
        return nothing_TH.index_add(0, visits.token_R, output_RH)

    def pre_activation(self, visits: Visits, rows_RH: Tensor, bias_CP: Tensor | None) -> Tensor:
        """Input of the gate, ``[R, P]``."""
        parts = [product(visits, rows_RH, matrix) for matrix in self.incoming]
        pre_RP = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return _plus(pre_RP, bias_CP, visits)

    def _gate(self, pre_RP: Tensor) -> Tensor:
        return silu_gate(pre_RP) if self.experts.is_silu_gated else self.experts.gate(pre_RP)


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None, "made together with the parameter"
    return parameter.grad


def _plus(values_RX: Tensor, bias_CX: Tensor | None, visits: Visits) -> Tensor:
    return values_RX if bias_CX is None else values_RX + bias_CX.index_select(0, visits.expert_R).to(values_RX.dtype)
