"""A target, the shapes of experts that meet it, and which of them a conversion takes.

N experts of I neurons become K experts of W neurons.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from statistics import fmean

from hcsmoe_hub.machine.units import format_bytes, format_count, format_percent
from hcsmoe_hub.methods.clustering import LossTable
from hcsmoe_hub.options import Target
from hcsmoe_hub.planning.expert_shape import ExpertShape
from hcsmoe_hub.report import TargetCandidate, TargetRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A shape of experts that meets a target.

    Attributes:
        shape: K and W.
        parameters: Parameters of all that the result stores.
        active: Parameters that one token uses.
        weights_bytes: Bytes of all weights on disk.
        ratio: Share of the parameters of the routed experts that is left, 0 to 1.
    """

    shape: ExpertShape
    parameters: int
    active: int
    weights_bytes: int
    ratio: float

    def uses(self, target: Target) -> float:
        """How much the candidate has of what a target limits."""
        match target.name:
            case "size":
                return self.weights_bytes
            case "parameters":
                return self.parameters
            case "active":
                return self.active
            case _:
                return self.ratio


def predicted_error(tables: Iterable[LossTable], experts: int, width: int) -> float:
    """What a shape of experts loses, predicted: the mean over the MoE layers of their losses.

    The loss of a layer is a share of the output energy of its routed experts, so that every layer counts alike.

    Args:
        tables: What fewer and narrower experts lose in each layer.
        experts: K.
        width: W.
    """
    return fmean(table.lost(experts, width) for table in tables)


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetPlan:
    """What a conversion to a target may become, and what it does become.

    Attributes:
        target: What was asked for.
        candidates: The shapes that meet it, most experts first.
        errors: Predicted error of each; ``None`` while nobody has observed the model.
    """

    target: Target
    candidates: tuple[Candidate, ...]
    errors: tuple[float, ...] | None = None

    @property
    def experts(self) -> list[int]:
        """All numbers of experts of the candidates, ascending."""
        return sorted({candidate.shape.experts for candidate in self.candidates})

    @property
    def widths(self) -> list[int]:
        """All widths of the candidates, ascending."""
        return sorted({candidate.shape.width for candidate in self.candidates})

    @property
    def chosen(self) -> Candidate | None:
        """The candidate of least predicted error, the only one, or ``None`` while that is open."""
        if len(self.candidates) == 1:
            return self.candidates[0]
        if self.errors is None:
            return None
        return self.candidates[self.errors.index(min(self.errors))]

    @property
    def shape(self) -> ExpertShape:
        """The chosen shape; while it is open, that of most experts, which need the most memory."""
        return (self.chosen or self.candidates[0]).shape

    def decided(self, tables: Mapping[int, LossTable]) -> "TargetPlan":
        """The same with the predicted error of every candidate; unchanged where a table lacks one.

        Args:
            tables: What fewer and narrower experts lose, by layer.
        """
        if not all(
            {*self.experts} <= {*table.experts} and {*self.widths} <= {*table.widths} for table in tables.values()
        ):
            return self
        shapes = [candidate.shape for candidate in self.candidates]
        errors = [predicted_error(tables.values(), shape.experts, shape.width) for shape in shapes]
        return replace(self, errors=tuple(errors))

    def record(self) -> TargetRecord:
        """The plan as reports have it."""
        chosen = self.chosen
        return {
            "limit": self.target.name,
            "value": float(self.target.limit),
            "chosen": None if chosen is None else self.candidates.index(chosen),
            "candidates": [self._entry(number) for number in range(len(self.candidates))],
        }

    def _entry(self, number: int) -> TargetCandidate:
        candidate = self.candidates[number]
        return {
            "experts": candidate.shape.experts,
            "width": candidate.shape.width,
            "parameters": candidate.parameters,
            "active_parameters": candidate.active,
            "weights_bytes": candidate.weights_bytes,
            "predicted_error": None if self.errors is None else self.errors[number],
        }


def describe(target: Target, value: float) -> str:
    """A value of what a target limits, in words: ``24.0 GB of weights``."""
    match target.name:
        case "size":
            return f"{format_bytes(int(value))} of weights"
        case "parameters":
            return f"{format_count(int(value))} parameters"
        case "active":
            return f"{format_count(int(value))} active parameters"
        case _:
            return f"{format_percent(value)} of the routed parameters"


def describe_limit(target: Target) -> str:
    """The limit of a target, in words."""
    return describe(target, target.limit)


def file_label(target: Target) -> str:
    """A target as part of a file name: ``24.0GB``, ``16.00B``, ``2.00B-active``, ``0.5``."""
    limit = int(target.limit)
    match target.name:
        case "size":
            return format_bytes(limit).replace(" ", "")
        case "parameters":
            return format_count(limit).replace(" ", "")
        case "active":
            return format_count(limit).replace(" ", "") + "-active"
        case _:
            return f"{target.limit:g}"
