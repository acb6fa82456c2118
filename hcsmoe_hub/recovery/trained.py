"""What a recovery trains of a result: tensors of the model itself, or factors of LoRA next to them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hcsmoe_hub.methods.totals import root_mean_square
from hcsmoe_hub.model.source_model import SourceModel
from hcsmoe_hub.model.trained import trained_parameters
from hcsmoe_hub.pipeline.whole_model import stored_dtypes
from hcsmoe_hub.recovery.options import RecoverOptions, Train


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Changing:
    """A tensor of the model that changes.

    Attributes:
        name: Its name.
        parameter: The parameter of the model.
        dtype: What it is stored in.
        delta: What LoRA adds to it; ``None`` where the parameter itself is trained.
    """

    name: str
    parameter: nn.Parameter
    dtype: torch.dtype
    delta: Callable[[], Tensor] | None = None

    def value(self) -> Tensor:
        """The tensor as it would be stored now, on its device."""
        value = self.parameter.detach()
        if self.delta is not None:
            value = value.float() + self.delta().float()
        return value.to(self.dtype)


class TrainedWeights:
    """Everything that changes.

    Args:
        changing: Tensors of the model.
        parameters: What an optimiser changes, by name, each float32 and with its largest step.
        adapters: Modules of LoRA, which add to tensors of the model while they are enabled.

    Attributes:
        parameters: The parameters by name.
        rates: Their largest steps by name.
        tensors: Names of the tensors of the model.
    """

    def __init__(
        self,
        changing: Sequence[Changing],
        parameters: Mapping[str, tuple[nn.Parameter, float]],
        adapters: Sequence[Any] = (),
    ) -> None:
        self._changing = changing
        self._adapters = adapters
        self.parameters = {name: parameter for name, (parameter, _) in parameters.items()}
        self.rates = {name: rate for name, (_, rate) in parameters.items()}
        self.tensors = [each.name for each in changing]

    @property
    def count(self) -> int:
        """Numbers that are trained."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    @torch.no_grad()
    def values(self) -> dict[str, Tensor]:
        """The tensors of the model as they would be stored now, on the CPU, by name."""
        return {each.name: each.value().to("cpu", copy=True) for each in self._changing}

    @contextmanager
    def as_stored(self) -> Iterator[None]:
        """Lets the model compute with these values inside a ``with`` block."""
        before = [each.parameter.data for each in self._changing]
        with torch.no_grad():
            rounded = [each.value().to(each.parameter.dtype) for each in self._changing]
        self._set(rounded, adapters=False)
        try:
            yield
        finally:
            self._set(before, adapters=True)

    def put(self, values: Mapping[str, Tensor]) -> None:
        """Lets the model compute with some values from now on, without what LoRA would add.

        Args:
            values: One for every tensor, by name.
        """
        held = [each.parameter for each in self._changing]
        new = [values[each.name].to(old.device, old.dtype) for each, old in zip(self._changing, held, strict=True)]
        self._set(new, adapters=False)

    def _set(self, values: Sequence[Tensor], *, adapters: bool) -> None:
        for each, value in zip(self._changing, values, strict=True):
            each.parameter.data = value
        for adapter in self._adapters:
            adapter.enable_adapters(adapters)

    def state(self) -> dict[str, Tensor]:
        """The parameters, for ``load_state``."""
        return {name: parameter.detach().to("cpu", copy=True) for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes over the parameters of an interrupted training."""
        for name, parameter in self.parameters.items():
            parameter.copy_(state[name])


def trained_weights(model: SourceModel, stored: Mapping[str, Tensor], options: RecoverOptions) -> TrainedWeights:
    """Makes tensors of a loaded model ready to be trained, or adds LoRA to it.

    Args:
        model: The result; its parameters do not require gradients yet.
        stored: Tensors that the model holds in another precision than they are stored in, by parameter name.
        options: Of the recovery.

    Raises:
        PlanError: If LoRA does not work on the model, or peft is not installed.
    """
    if options.is_lora:
        from hcsmoe_hub.recovery.lora import add_lora

        adapters = add_lora(model, rank=options.rank or 0, seed=options.seed)
        dtypes = stored_dtypes(model)
        changing = [
            Changing(name=each.tensor, parameter=each.base, dtype=dtypes[each.tensor], delta=each.delta)
            for each in adapters
        ]
        factors = {name: (factor, options.rate) for each in adapters for name, factor in each.factors.items()}
        return TrainedWeights(changing, factors, [each.layer for each in adapters])
    parameters, dtypes = dict(model.skeleton.module.named_parameters()), stored_dtypes(model)
    changing, trained = [], {}
    for name in trained_names(model, options):
        parameter = parameters[name]
        exact = stored.get(name, parameter.detach())
        parameter.data = exact.to(parameter.device, torch.float32, copy=True)
        parameter.requires_grad_(True)
        changing.append(Changing(name=name, parameter=parameter, dtype=dtypes[name]))
        trained[name] = (parameter, options.rate * float(root_mean_square(parameter.detach())))
    return TrainedWeights(changing, trained)


def trained_names(model: SourceModel, options: RecoverOptions) -> list[str]:
    """Names of the tensors of a model that ``train`` stands for, in the order of the model; not for LoRA."""
    return trained_parameters(
        model,
        routers=Train.ROUTER in options.train,
        experts=Train.EXPERTS in options.train,
        norms=Train.NORMS in options.train,
    )
