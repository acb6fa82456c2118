"""How commands behave where a launcher (torchrun, accelerate, srun) has started several processes of them.

Only the first rank prints; another one does if it alone knows what has gone wrong.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from hcsmoe_hub.cli.help_page import HelpCommand
from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.machine.signals import STOPPED


def is_launched() -> bool:
    """Whether a launcher has started this process along with others."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1 and {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def is_first() -> bool:
    """Whether this process is the first of those that were started, or the only one."""
    return not is_launched() or int(os.environ["RANK"]) == 0


@contextmanager
def others_silent() -> Iterator[None]:
    """Lets only the first rank print inside a ``with`` block, libraries included."""
    if is_first():
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        sys.stdout = sys.stderr = nowhere
        try:
            yield
        finally:
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__


class SharedCommand(HelpCommand):
    """A command that all ranks run together."""

    def invoke(self, ctx: Any) -> Any:
        """Runs it; of a failure, one rank reports."""
        if not is_launched():
            return super().invoke(ctx)
        # Of a lost connection torch would print a page of its own.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        # torch takes seconds to import, which a usage error need not wait for.
        from hcsmoe_hub.machine.launched import meeting

        watch = None
        try:
            with meeting() as watch:
                return super().invoke(ctx)
        except BaseException as error:
            # Before they have met, nobody knows of the others; one rank of every machine is enough.
            reports = watch.reports(error) if watch is not None else os.environ.get("LOCAL_RANK", "0") == "0"
            if watch is not None:
                watch.wait_for_others()
            if not reports:
                raise typer.Exit(STOPPED if isinstance(error, KeyboardInterrupt) else 1) from error
            sys.stderr = sys.__stderr__
            raise


class FirstCommand(HelpCommand):
    """A command that one process runs: the first rank, while the others have nothing to do."""

    def invoke(self, ctx: Any) -> Any:
        """Runs it on the first rank."""
        return super().invoke(ctx) if is_first() else None


class SingleCommand(HelpCommand):
    """A command that takes long, and that several ranks could not make faster."""

    def invoke(self, ctx: Any) -> Any:
        """Runs it in a single process.

        Raises:
            PlanError: If a launcher has started several.
        """
        if is_launched():
            raise PlanError(
                f"'hcsmoe {self.name}' runs in a single process, but {os.environ['WORLD_SIZE']} were started.",
                hint="start it without a launcher",
            )
        return super().invoke(ctx)
