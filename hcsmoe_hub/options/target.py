"""What a result may weigh, where that is asked for instead of numbers of experts and neurons."""

from dataclasses import dataclass, fields

from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.options.checks import Quantity, Share, Size, check_fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One limit that a result must keep to; the planner finds the best number and width of experts under it.

    Attributes:
        size: Bytes of all weights on disk; also a text such as ``24GB``.
        parameters: Number of parameters; also a text such as ``16B``.
        active: Number of parameters that one token uses.
        ratio: Share of the parameters of all routed experts that stays, more than 0 and less than 1.

    Raises:
        PlanError: If a value is not one that the option takes, or not exactly one is given.
    """

    size: Size | None = None
    parameters: Quantity | None = None
    active: Quantity | None = None
    ratio: Share | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        given = [field.name for field in fields(self) if getattr(self, field.name) is not None]
        if len(given) != 1:
            found = f"{' and '.join(f'`{name}`' for name in given)} are given" if given else "none is given"
            names = " or ".join(f"`{field.name}`" for field in fields(self))
            raise PlanError(f"a target is one limit, but {found}.", hint=f"give one: {names}")

    @property
    def name(self) -> str:
        """Which limit it is."""
        return next(field.name for field in fields(self) if getattr(self, field.name) is not None)

    @property
    def limit(self) -> float:
        """The limit, in bytes, parameters, or as a share."""
        value: float = getattr(self, self.name)
        return value
