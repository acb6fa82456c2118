"""Options of an evaluation."""

from dataclasses import dataclass
from pathlib import Path

from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.evaluation.cost_options import CostOptions
from hcsmoe_hub.options import Device
from hcsmoe_hub.options.checks import Count, DeviceName, Natural, check_fields

DEFAULT_WINDOW = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateOptions:
    """What to measure, and where to run.

    Attributes:
        base: The checkpoint to compare with, usually the source: folder or Hub repository.
        perplexity: Text for perplexity, agreement and prompts: a ``.jsonl`` of ``{"text", "domain"}``; for a model with
            an encoder pairs, ``{"source", "target", "domain"}``, or text that spans are cut out of.
        choices: Multiple choice: a ``.jsonl`` of ``{"context", "choices", "gold", "domain"}``; an encoder reads the
            context.
        tasks: Tasks of lm-eval: names, the group ``hc-smoe``, task files, or folders of them.
        limit: Only the first so many questions of every task (of every subject of MMLU); ``None`` for all.
        generate: Number of prompts from the text, or of sources, to continue greedily; 0 for none.
        window: Tokens of text that are predicted at once; pairs are not cut.
        cost: How to count and measure what the model costs: parameters, FLOPs, memory, throughput; ``None`` for not at
            all.
        device: Where the model runs.
        stream: Hold one decoder layer at a time even if the model fits into memory.
        output: Result file; ``None`` puts it next to the model.
    """

    base: str | Path | None = None
    perplexity: Path | None = None
    choices: Path | None = None
    tasks: tuple[str, ...] = ()
    limit: Count | None = None
    generate: Natural = 0
    window: Count = DEFAULT_WINDOW
    cost: CostOptions | None = None
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
        if self.limit is not None and not self.tasks:
            raise PlanError(
                f"`limit={self.limit}` would have no effect: it is for tasks of lm-eval, and there are none.",
                hint="add `tasks`, or leave `limit` out",
                option="limit",
            )
        if self.cost is not None:
            self.cost.check()
        elif not self.reads_text:
            raise PlanError(
                "there is nothing to measure.",
                hint="add `perplexity='FILE.jsonl'`, `choices='FILE.jsonl'`, `tasks` or `cost`",
            )

    @property
    def reads_text(self) -> bool:
        """Whether anything is measured on text, for which a tokenizer is needed."""
        return self.perplexity is not None or self.choices is not None or bool(self.tasks)
