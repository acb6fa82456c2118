"""What reaches the experts of a reduced block: decided anew by its router, or as it was decided once.

T tokens of one step, K experts per token, H hidden size.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate.utils import recursively_apply
from torch import Tensor, nn

from hcsmoe_hub.machine.accelerator import free_bytes, is_host
from hcsmoe_hub.model.experts import Experts
from hcsmoe_hub.observation.observers import InputObserver
from hcsmoe_hub.observation.runnable_block import RunnableBlock
from hcsmoe_hub.observation.statistics import Call

# Tokens by which it is found out which parts of a block the router does not depend on.
PROBE_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Routed:
    """What experts are given.

    Attributes:
        tokens_TH: Their inputs.
        index_TK: Experts that the router chose; -1 for none.
        weight_TK: Router weights of the choices, float32; 0 where it chose none.
    """

    tokens_TH: Tensor
    index_TK: Tensor
    weight_TK: Tensor

    @classmethod
    def of(cls, experts: Experts, tokens_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> "Routed":
        """From what transformers gives to the experts, where a weight of 0 or a high index stands for no expert."""
        is_routed = (weight_TK != 0) & (index_TK < experts.num_experts) & (index_TK >= 0)
        return cls(
            tokens_TH=tokens_TH,
            index_TK=torch.where(is_routed, index_TK, -1),
            weight_TK=torch.where(is_routed, weight_TK, 0).float(),
        )


class Routing(Protocol):
    """Where tokens go."""

    @property
    def is_live(self) -> bool:
        """Whether the router decides anew, and can be trained."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the experts are."""
        ...

    def bring(self, reserved: int) -> None:
        """Moves the inputs of all tokens to the device if they leave so many bytes of it free."""
        ...

    def route(self, tokens: Tensor) -> Routed:
        """What reaches the experts from some tokens, on the device; token numbers are int64 on any device."""
        ...


def picked(values: Tensor, tokens: Tensor, device: torch.device) -> Tensor:
    """Some rows of a tensor, brought to a device; the numbers of the rows may be anywhere."""
    return values[tokens.to(values.device)].to(device)


def brought(values: Tensor, device: torch.device, reserved: int) -> Tensor:
    """A tensor on a device if that leaves so many bytes free there, or where it is."""
    if values.device == device or is_host(device):
        return values
    return values.to(device) if values.nbytes + reserved <= free_bytes(device) else values


@dataclass(slots=True, kw_only=True, eq=False)
class FixedRouting:
    """The choices that a router has made, for blocks that do not run on single tokens."""

    routed: Routed
    device: torch.device
    is_live: bool = False

    @classmethod
    def of(cls, reduced: RunnableBlock, calls: list[Call]) -> "FixedRouting":
        """Runs the block once on all it was given, but for its experts."""
        observer = reduced.rerun(calls, InputObserver)
        tokens_TH, weight_TK = torch.cat(observer.tokens), torch.cat(observer.weights)
        index_TK = torch.cat(observer.top_k).long()
        return cls(routed=Routed.of(reduced.experts, tokens_TH, index_TK, weight_TK), device=reduced.device)

    def bring(self, reserved: int) -> None:
        """See ``Routing``."""
        known = self.routed
        self.routed = Routed(
            tokens_TH=brought(known.tokens_TH, self.device, reserved),
            index_TK=brought(known.index_TK, self.device, reserved),
            weight_TK=brought(known.weight_TK, self.device, reserved),
        )

    def route(self, tokens: Tensor) -> Routed:
        """See ``Routing``."""
        known = self.routed
        return Routed(
            tokens_TH=picked(known.tokens_TH, tokens, self.device),
            index_TK=picked(known.index_TK, tokens, self.device),
            weight_TK=picked(known.weight_TK, tokens, self.device),
        )


class _ExpertsReached(Exception):
    """Ends the run of a block where its experts would begin."""

    def __init__(self, routed: Routed) -> None:
        super().__init__()
        self.routed = routed


def _stop(experts: Experts, tokens_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """An observer that has seen enough."""
    raise _ExpertsReached(Routed.of(experts, tokens_TH, index_TK, weight_TK))


@dataclass(slots=True, kw_only=True, eq=False)
class LiveRouting:
    """Runs a block up to its experts.

    Attributes:
        moe: The block.
        device: Where it is.
        args: What it is given, ``[all tokens, ...]`` each; there or on the host.
        kwargs: The same, by name.
    """

    moe: nn.Module
    device: torch.device
    args: Sequence[Tensor | None]
    kwargs: Mapping[str, Tensor | None]
    is_live: bool = True

    @classmethod
    @contextmanager
    def of(cls, reduced: RunnableBlock, calls: list[Call]) -> Iterator["LiveRouting"]:
        """Opens a block for runs that end at its experts; the rest of it does not run.

        Args:
            reduced: The block.
            calls: What it is given; single tokens.
        """
        first, moe = calls[0], reduced.moe
        routing = cls(
            moe=moe,
            device=reduced.device,
            args=[_joined([call.args[place] for call in calls]) for place in range(len(first.args))],
            kwargs={name: _joined([call.kwargs[name] for call in calls]) for name in first.kwargs},
        )
        with ExitStack() as stack:
            stack.enter_context(reduced.experts.observing(moe, _stop))
            for child, forward in routing._bystanders(_parts(reduced)):
                vars(child)["forward"] = forward
                stack.callback(vars(child).pop, "forward")
            yield routing

    def bring(self, reserved: int) -> None:
        """See ``Routing``."""

        def move(values: Tensor) -> Tensor:
            return brought(values, self.device, reserved)

        self.args, self.kwargs = recursively_apply(move, (list(self.args), dict(self.kwargs)))

    def route(self, tokens: Tensor) -> Routed:
        """See ``Routing``."""

        def place(values: Tensor) -> Tensor:
            chosen = picked(values, tokens, self.device)[None]
            return chosen.float() if values.is_floating_point() else chosen

        args, kwargs = recursively_apply(place, (list(self.args), dict(self.kwargs)))
        try:
            self.moe(*args, **kwargs)
        except _ExpertsReached as reached:
            return reached.routed
        raise AssertionError("an MoE block runs its experts")

    def _bystanders(self, parts: set[str]) -> list[tuple[nn.Module, Callable[..., Tensor]]]:
        """Modules that run before the experts although these do not depend on them, and what can stand for them.

        Shared experts, in many architectures.

        Args:
            parts: Names of the children of the block that are its router or its experts.
        """
        probe, found = torch.arange(min(PROBE_TOKENS, len(self._some))), []
        shapes: dict[str, int] = {}
        others = {name: child for name, child in self.moe.named_children() if name not in parts}
        hooks = [child.register_forward_hook(_remembering(name, shapes)) for name, child in others.items()]
        with torch.no_grad():
            wanted = self.route(probe)
            for hook in hooks:
                hook.remove()
            for name, width in shapes.items():
                stand_in = _zeros(width)
                vars(others[name])["forward"] = stand_in
                if _are_same(self.route(probe), wanted):
                    found.append((others[name], stand_in))
                del vars(others[name])["forward"]
        return found

    @property
    def _some(self) -> Tensor:
        return next(value for value in (*self.args, *self.kwargs.values()) if value is not None)


def _parts(reduced: RunnableBlock) -> set[str]:
    """Names of the children of a block that hold its router or its experts."""
    block = reduced.block
    paths = [block.experts_path, *(tensor.name for tensor in block.router), *block.tables]
    return {path.removeprefix(f"{block.path}.").partition(".")[0] for path in paths}


def _joined(values: Sequence[Tensor | None]) -> Tensor | None:
    given = [value.flatten(0, 1) for value in values if value is not None]
    return torch.cat(given) if given else None


def _remembering(name: str, shapes: dict[str, int]) -> Callable[[nn.Module, Any, Any], None]:
    def remember(_module: nn.Module, args: Any, result: Any) -> None:
        if isinstance(result, Tensor) and args and result.shape[:-1] == args[0].shape[:-1]:
            shapes[name] = result.shape[-1]

    return remember


def _zeros(width: int) -> Callable[..., Tensor]:
    def forward(states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        return states.new_zeros(*states.shape[:-1], width)

    return forward


def _are_same(one: Routed, other: Routed) -> bool:
    pairs = ((one.tokens_TH, other.tokens_TH), (one.index_TK, other.index_TK), (one.weight_TK, other.weight_TK))
    return all(torch.equal(first, second) for first, second in pairs)


@contextmanager
def routing_of(reduced: RunnableBlock, calls: list[Call]) -> Iterator[Routing]:
    """The routing of a block: live where it runs on single tokens.

    Args:
        reduced: The block, in float32.
        calls: What it is given.
    """
    if not reduced.runs_on_tokens(calls):
        yield FixedRouting.of(reduced, calls)
        return
    with LiveRouting.of(reduced, calls) as routing:
        yield routing
