"""Options of an evaluation."""

from dataclasses import dataclass
from pathlib import Path

from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.options import Device
from hcsmoe_hub.options.checks import Count, DeviceName, Natural, check_fields

DEFAULT_WINDOW = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateOptions:
    """What to measure, and where to run.

    Attributes:
        base: The checkpoint to compare with, usually the source: folder or Hub repository.
        perplexity: Text for perplexity, agreement and prompts: a ``.jsonl`` of ``{"text", "domain"}``.
        choices: Multiple choice: a ``.jsonl`` of ``{"context", "choices", "gold", "domain"}``.
        tasks: Tasks of lm-eval: names, the group ``hc-smoe``, task files, or folders of them.
        generate: Number of prompts from the text to continue greedily; 0 for none.
        window: Tokens of text that are predicted at once.
        device: Where the model runs.
        stream: Hold one decoder layer at a time even if the model fits into memory.
        output: Result file; ``None`` puts it next to the model.
    """

    base: str | Path | None = None
    perplexity: Path | None = None
    choices: Path | None = None
    tasks: tuple[str, ...] = ()
    generate: Natural = 0
    window: Count = DEFAULT_WINDOW
    device: DeviceName = Device.AUTO
    stream: bool = False
    output: Path | None = None

    def __post_init__(self) -> None:
        check_fields(self)

    def check(self) -> None:
        """Checks the values, and that there is something to measure.

        Raises:
            PlanError: If a value is out of range, or nothing is to be measured.
        """
        if self.generate and self.perplexity is None:
            raise PlanError(
                f"`generate={self.generate}` needs text to take its prompts from.",
                hint="add `perplexity='FILE.jsonl'`",
                option="perplexity",
            )
        if self.perplexity is None and self.choices is None and not self.tasks:
            raise PlanError(
                "there is nothing to measure.",
                hint="add `perplexity='FILE.jsonl'`, `choices='FILE.jsonl'` or `tasks`",
            )
