"""What an evaluation will measure: files read, text cut to size, tasks found; only the model has not run."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.evaluation.checkpoint import Checkpoint
from hcsmoe_hub.evaluation.choices import Pair, choice_pairs
from hcsmoe_hub.evaluation.loops import CONTINUATION_TOKENS, Prompt, choose_prompts
from hcsmoe_hub.evaluation.options import EvaluateOptions
from hcsmoe_hub.evaluation.perplexity import Window, cut_windows
from hcsmoe_hub.evaluation.records import ChoiceItem, read_choices, read_texts
from hcsmoe_hub.evaluation.tasks import find_tasks
from hcsmoe_hub.evaluation.tokens import Tokens, check_same


@dataclass(slots=True, kw_only=True)
class Work:
    """Everything that a model will be asked.

    Attributes:
        tokens: Tokenizer of the model.
        windows: For perplexity and agreement.
        prompts: To be continued.
        text_file: Where both come from: name, sha256, records, tokens.
        items: Multiple choice.
        pairs: What each item asks.
        choice_file: Where they come from: name, sha256, records, tokens.
        task_manager: Of lm-eval.
        task_names: Tasks that it runs.
        texts: Every text that was turned into tokens.
    """

    tokens: Tokens
    windows: list[Window] = field(default_factory=list)
    prompts: list[Prompt] = field(default_factory=list)
    text_file: dict[str, Any] = field(default_factory=dict)
    items: list[ChoiceItem] = field(default_factory=list)
    pairs: list[list[tuple[Pair, Pair]]] = field(default_factory=list)
    choice_file: dict[str, Any] = field(default_factory=dict)
    task_manager: Any = None
    task_names: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    def all_pairs(self) -> Iterator[Pair]:
        """Every context with a choice that is scored, equal ones as often as they are asked."""
        return (pair for choices in self.pairs for both in choices for pair in both)

    def steps(self, models: int) -> int:
        """How often progress is told: windows pass all models side by side, the rest one model after the other."""
        others = len(set(self.all_pairs())) + bool(self.prompts) + bool(self.task_names)
        return len(self.windows) + others * models

    def longest(self) -> int:
        """Tokens of the longest sequence that a model will see at once."""
        lengths = [len(window.ids) - 1 for window in self.windows]
        lengths += [len(before) + len(choice) - 1 for before, choice in self.all_pairs()]
        lengths += [len(ids) + CONTINUATION_TOKENS for _, ids in self.prompts]
        return max(lengths, default=0)


def prepare(options: EvaluateOptions, checkpoint: Checkpoint) -> Work:
    """Reads the files and turns them into tokens.

    Raises:
        PlanError: If a file, a task or the tokenizer is not what it has to be, or something is too long.
    """
    work = Work(tokens=Tokens(checkpoint.source))
    if options.tasks:
        work.task_manager, work.task_names = find_tasks(options.tasks)
    if options.perplexity is not None:
        records, file = read_texts(options.perplexity)
        work.windows = cut_windows(records, work.tokens, window=options.window)
        if not work.windows:
            raise PlanError(f"the text of {options.perplexity} has no tokens.", hint="pass text that can be read")
        work.prompts = choose_prompts(records, work.tokens, count=options.generate)
        work.texts += [record.text for record in records]
        work.text_file = {**asdict(file), "tokens": sum(len(window.ids) - 1 for window in work.windows)}
    if options.choices is not None:
        work.items, file = read_choices(options.choices)
        work.pairs = [choice_pairs(item, work.tokens) for item in work.items]
        if not all(choice for _, choice in work.all_pairs()):
            raise PlanError(f"a choice in {options.choices} has no tokens.", hint="pass choices that can be read")
        work.texts += [text for item in work.items for text in (item.context, *item.choices)]
        work.choice_file = {**asdict(file), "tokens": sum(len(choice) for _, choice in work.all_pairs()) // 2}
    limit = checkpoint.max_positions
    if limit is not None and work.longest() > limit:
        raise PlanError(
            f"{checkpoint.source.label} takes {limit} positions, and the longest sequence has {work.longest()} tokens.",
            hint="use a smaller --window, shorter questions, or no --generate",
        )
    return work


def check_comparable(model: Checkpoint, base: Checkpoint, work: Work) -> None:
    """Checks that figures of two checkpoints can stand side by side.

    Raises:
        PlanError: If their vocabularies or their tokenizers differ.
    """
    if model.vocab_size != base.vocab_size:
        raise PlanError(
            f"{model.source.label} predicts {model.vocab_size} tokens, {base.source.label} {base.vocab_size}, so they "
            "cannot be compared.",
            hint="pass the checkpoint that the model was made from as --base",
        )
    check_same(work.tokens, Tokens(base.source), work.texts)
