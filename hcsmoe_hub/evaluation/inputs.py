"""Prepares the inputs of an evaluation: reads files, cuts text into windows, finds tasks."""

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
class Inputs:
    """Inputs of all measures.

    Attributes:
        tokens: Tokenizer of the model.
        windows: Windows for perplexity and agreement.
        prompts: Prompts to continue.
        text_file: File of the windows and prompts: name, sha256, records, tokens.
        items: Multiple-choice questions.
        pairs: Pairs of context and choice to score, per question.
        choice_file: File of the questions: name, sha256, records, tokens.
        task_manager: Task manager of lm-eval.
        task_names: Tasks that lm-eval runs.
        texts: Every text that was tokenized.
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
        """Every pair of context and choice to score, duplicates included."""
        return (pair for choices in self.pairs for both in choices for pair in both)

    def steps(self, models: int) -> int:
        """Number of progress steps: one per window for all models together, the others once per model."""
        others = len(set(self.all_pairs())) + bool(self.prompts) + bool(self.task_names)
        return len(self.windows) + others * models

    def longest(self) -> int:
        """Tokens of the longest sequence that a model processes at once."""
        lengths = [len(window.ids) - 1 for window in self.windows]
        lengths += [len(before) + len(choice) - 1 for before, choice in self.all_pairs()]
        lengths += [len(ids) + CONTINUATION_TOKENS for _, ids in self.prompts]
        return max(lengths, default=0)


def prepare_inputs(options: EvaluateOptions, checkpoint: Checkpoint) -> Inputs:
    """Reads and tokenizes the files, and finds the tasks.

    Raises:
        PlanError: If a file, a task or the tokenizer is not valid, or a sequence is too long for the model.
    """
    inputs = Inputs(tokens=Tokens(checkpoint.source, vocab_size=checkpoint.vocab_size))
    if options.tasks:
        inputs.task_manager, inputs.task_names = find_tasks(options.tasks)
    if options.perplexity is not None:
        records, file = read_texts(options.perplexity)
        inputs.windows = cut_windows(records, inputs.tokens, window=options.window)
        if not inputs.windows:
            raise PlanError(f"the text of {options.perplexity} has no tokens.", hint="pass text that is not empty")
        inputs.prompts = choose_prompts(records, inputs.tokens, count=options.generate)
        inputs.texts += [record.text for record in records]
        inputs.text_file = {**asdict(file), "tokens": sum(len(window.ids) - 1 for window in inputs.windows)}
    if options.choices is not None:
        inputs.items, file = read_choices(options.choices)
        inputs.pairs = [choice_pairs(item, inputs.tokens) for item in inputs.items]
        if not all(choice for _, choice in inputs.all_pairs()):
            raise PlanError(f"a choice in {options.choices} has no tokens.", hint="pass choices that are not empty")
        inputs.texts += [text for item in inputs.items for text in (item.context, *item.choices)]
        inputs.choice_file = {**asdict(file), "tokens": sum(len(choice) for _, choice in inputs.all_pairs()) // 2}
    limit = checkpoint.max_positions
    if limit is not None and inputs.longest() > limit:
        raise PlanError(
            f"{checkpoint.source.label} accepts {limit} positions, but the longest sequence has {inputs.longest()} "
            "tokens.",
            hint="use a smaller `window`, shorter questions, or drop `generate`",
        )
    return inputs


def check_comparable(model: Checkpoint, base: Checkpoint, inputs: Inputs) -> None:
    """Checks that the figures of two checkpoints are comparable.

    Raises:
        PlanError: If their vocabularies or their tokenizers differ.
    """
    if model.vocab_size != base.vocab_size:
        raise PlanError(
            f"{model.source.label} has a vocabulary of {model.vocab_size} tokens and {base.source.label} of "
            f"{base.vocab_size}, so they cannot be compared.",
            hint="pass the checkpoint that the model was made from as `base`",
        )
    check_same(inputs.tokens, Tokens(base.source, vocab_size=base.vocab_size), inputs.texts)
