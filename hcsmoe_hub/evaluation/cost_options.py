"""Options of the cost table."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from importlib.util import find_spec

from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.machine.units import format_plural
from hcsmoe_hub.options.checks import Count, check_fields

# The reason for figures that are missing because nobody asked for them.
SWITCHED_OFF = "timing is switched off"
DEFAULT_PROMPT_TOKENS, DEFAULT_NEW_TOKENS, DEFAULT_REPETITIONS, DEFAULT_BATCH_SIZES = 256, 32, 5, (1, 16)


class Engine(StrEnum):
    """Programs that throughput is measured with."""

    TORCH = "torch"
    VLLM = "vllm"


@dataclass(frozen=True, slots=True, kw_only=True)
class CostOptions:
    """How cost is counted and measured.

    Attributes:
        engine: What runs the model.
        prompt_tokens: Tokens of a prompt, and the context length at which FLOPs are counted; ``None`` for 256, or as
            many as the models accept before ``new_tokens``.
        new_tokens: Tokens that are generated after it.
        repetitions: Measured runs per batch size, after one to warm up.
        batch_sizes: Prompts that run at once.
        timing: Whether throughput and peak memory are measured; otherwise figures come from config and headers alone.
    """

    engine: Engine = Engine.TORCH
    prompt_tokens: Count | None = None
    new_tokens: Count = DEFAULT_NEW_TOKENS
    repetitions: Count = DEFAULT_REPETITIONS
    batch_sizes: tuple[Count, ...] = DEFAULT_BATCH_SIZES
    timing: bool = True

    def __post_init__(self) -> None:
        check_fields(self)

    def check(self) -> None:
        """Checks that there is a batch size, and that the engine is installed.

        Raises:
            PlanError: If not.
        """
        if not self.batch_sizes:
            raise PlanError("`batch_sizes` is empty.", hint="pass at least one number", option="batch_sizes")
        if self.timing and self.engine is Engine.VLLM and find_spec("vllm") is None:
            raise PlanError(
                "`engine='vllm'` runs vLLM, which is not installed.",
                hint="pip install vllm, or use `engine='torch'`",
                option="engine",
            )

    @property
    def prompt_length(self) -> int:
        """Tokens of a prompt."""
        return DEFAULT_PROMPT_TOKENS if self.prompt_tokens is None else self.prompt_tokens

    def fitting(self, limits: Mapping[str, int | None]) -> "CostOptions":
        """These options with a number of prompt tokens, which leaves room for new ones.

        Args:
            limits: Maximum sequence length of every model by its label, ``None`` if it is not known.

        Raises:
            PlanError: If a model does not accept as many.
        """
        known = {label: limit for label, limit in limits.items() if limit is not None}
        found = self
        if self.prompt_tokens is None:
            room = min(known.values(), default=DEFAULT_PROMPT_TOKENS + self.new_tokens) - self.new_tokens
            found = replace(self, prompt_tokens=max(1, min(DEFAULT_PROMPT_TOKENS, room)))
        needed = found.prompt_length + found.new_tokens
        for label, limit in known.items():
            if needed > limit:
                raise PlanError(
                    f"{label} accepts {limit} positions, but a prompt of "
                    f"{format_plural(found.prompt_length, 'token')} and {found.new_tokens} new ones take {needed}.",
                    hint="use a smaller `prompt_tokens` or `new_tokens`",
                    option="prompt_tokens" if self.prompt_tokens is not None else "new_tokens",
                )
        return found
