"""Options of the cost table."""

from dataclasses import dataclass
from enum import StrEnum
from importlib.util import find_spec

from hcsmoe_hub.errors import PlanError
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
        prompt_tokens: Tokens of a prompt, and the context length at which FLOPs are counted.
        new_tokens: Tokens that are generated after it.
        repetitions: Measured runs per batch size, after one to warm up.
        batch_sizes: Prompts that run at once.
        timing: Whether throughput and peak memory are measured; otherwise figures come from config and headers alone.
    """

    engine: Engine = Engine.TORCH
    prompt_tokens: Count = DEFAULT_PROMPT_TOKENS
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

    def check_positions(self, limit: int | None, label: str) -> None:
        """Checks that a model accepts the prompt and what is generated after it.

        Args:
            limit: Maximum sequence length of the model, ``None`` if it is not known.
            label: What the model is called.

        Raises:
            PlanError: If it does not.
        """
        needed = self.prompt_tokens + self.new_tokens
        if limit is not None and needed > limit:
            raise PlanError(
                f"{label} accepts {limit} positions, but a prompt of {self.prompt_tokens} tokens and {self.new_tokens} "
                f"new ones take {needed}.",
                hint="use a smaller `prompt_tokens` or `new_tokens`",
                option="prompt_tokens",
            )
