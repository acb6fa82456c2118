"""The options of ``hcsmoe convert`` that limit what a result may weigh."""

from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any

import typer

from hcsmoe_hub.cli.values import parse_quantity, parse_share, parse_size
from hcsmoe_hub.options import Target

_target = partial(typer.Option, rich_help_panel="Target", show_default=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetFlags:
    """Fields of ``Target`` as they were typed; ``None`` where nothing was."""

    size: Annotated[
        Any,
        _target(
            "--size",
            parser=parse_size,
            metavar="SIZE",
            help="Most that the weights take, e.g. 24GB; number and width follow.",
        ),
    ] = None
    parameters: Annotated[
        Any,
        _target("--parameters", parser=parse_quantity, metavar="COUNT", help="Most parameters in all, e.g. 16B."),
    ] = None
    active: Annotated[
        Any,
        _target("--active", parser=parse_quantity, metavar="COUNT", help="Most parameters that a token uses, e.g. 2B."),
    ] = None
    ratio: Annotated[
        Any,
        _target(
            "--ratio",
            parser=parse_share,
            metavar="SHARE",
            help="Share of the routed parameters that stays, e.g. 0.5.",
        ),
    ] = None

    def target(self) -> Target | None:
        """The limit; ``None`` if there is none.

        Raises:
            PlanError: If there are several.
        """
        given = {name: value for name, value in asdict(self).items() if value is not None}
        return Target(**given) if given else None
