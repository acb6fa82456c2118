"""Prepares the inputs of an evaluation: reads files, cuts text into windows, finds tasks."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.evaluation.checkpoint import Checkpoint
from hcsmoe_hub.evaluation.choices import Scored, choice_pairs
from hcsmoe_hub.evaluation.loops import CONTINUATION_TOKENS, Prompt, choose_prompts
from hcsmoe_hub.evaluation.options import EvaluateOptions
from hcsmoe_hub.evaluation.perplexity import Window, cut_windows
from hcsmoe_hub.evaluation.records import ChoiceItem, PairRecord, read_choices, read_sides, read_texts
from hcsmoe_hub.evaluation.sides import choice_sides, choose_sources, cut_sides, first_labels
from hcsmoe_hub.evaluation.tasks import find_tasks
from hcsmoe_hub.evaluation.tokens import Tokens, check_same


@dataclass(slots=True, kw_only=True)
class Inputs:
    """Inputs of all measures.

    Attributes:
        tokens: Tokenizer of the model.
        windows: Windows for perplexity and agreement.
        prompts: Prompts to continue.
        begins: Of a model with an encoder, what its decoder has written already of each continuation.
        text_file: File of the windows and prompts: name, sha256, records, tokens.
        items: Multiple-choice questions.
        pairs: Pairs of context and choice to score, per question.
        choice_file: File of the questions: name, sha256, records, tokens.
        task_manager: Task manager of lm-eval.
        task_names: Tasks that lm-eval runs.
        texts: Every text that was tokenized.
        has_encoder: Whether an encoder reads a source, and targets are predicted.
    """

    tokens: Tokens
    has_encoder: bool = False
    windows: list[Window] = field(default_factory=list)
    prompts: list[Prompt] = field(default_factory=list)
    begins: list[list[int]] = field(default_factory=list)
    text_file: dict[str, Any] = field(default_factory=dict)
    items: list[ChoiceItem] = field(default_factory=list)
    pairs: list[list[tuple[Scored, Scored]]] = field(default_factory=list)
    choice_file: dict[str, Any] = field(default_factory=dict)
    task_manager: Any = None
    task_names: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    def all_pairs(self) -> Iterator[Scored]:
        """Every pair of context and choice to score, duplicates included."""
        return (pair for choices in self.pairs for both in choices for pair in both)

    def steps(self, models: int) -> int:
        """Number of progress steps: one per window for all models together, the others once per model."""
        others = len(set(self.all_pairs())) + bool(self.prompts) + bool(self.task_names)
        return len(self.windows) + others * models

    def longest(self) -> int:
        """Tokens of the longest sequence that a model processes at once."""
        requests = [window.request for window in self.windows]
        lengths = [max(len(request.ids), len(request.source)) for request in requests]
        if self.has_encoder:
            lengths += [max(len(source), len(choice)) for source, choice in self.all_pairs()]
            lengths += [len(begin) + 1 + CONTINUATION_TOKENS for begin in self.begins]
        else:
            lengths += [len(before) + len(choice) - 1 for before, choice in self.all_pairs()]
            lengths += [len(ids) + CONTINUATION_TOKENS for _, ids in self.prompts]
        return max(lengths, default=0)


def prepare_inputs(options: EvaluateOptions, checkpoint: Checkpoint) -> Inputs:
    """Reads and tokenizes the files, and finds the tasks.

    Raises:
        PlanError: If a file, a task or the tokenizer is not valid, or a sequence is too long for the model.
    """
    if options.tasks and checkpoint.has_encoder:
        raise PlanError(
            f"the tasks of lm-eval continue a text, but {checkpoint.source.label} has an encoder that reads one text "
            "and a decoder that writes another.",
            hint="leave `tasks` out, and pass questions with `choices='FILE.jsonl'`",
        )
    tokens = Tokens(checkpoint.source, vocab_size=checkpoint.vocab_size)
    inputs = Inputs(tokens=tokens, has_encoder=checkpoint.has_encoder)
    if options.tasks:
        inputs.task_manager, inputs.task_names = find_tasks(options.tasks)
    if options.perplexity is not None:
        read = _read_sides if checkpoint.has_encoder else _read_text
        read(inputs, options, options.perplexity)
        if not inputs.windows:
            raise PlanError(f"the text of {options.perplexity} has no tokens.", hint="pass text that is not empty")
        inputs.text_file["tokens"] = sum(len(window.labels) for window in inputs.windows)
    if options.choices is not None:
        inputs.items, file = read_choices(options.choices)
        pairs_of = choice_sides if checkpoint.has_encoder else choice_pairs
        inputs.pairs = [pairs_of(item, tokens) for item in inputs.items]
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


def _read_text(inputs: Inputs, options: EvaluateOptions, path: Path) -> None:
    """Reads text for a model that has a decoder alone."""
    records, file = read_texts(path)
    inputs.windows = cut_windows(records, inputs.tokens, window=options.window)
    inputs.prompts = choose_prompts(records, inputs.tokens, count=options.generate)
    inputs.texts += [record.text for record in records]
    inputs.text_file = asdict(file)


def _read_sides(inputs: Inputs, options: EvaluateOptions, path: Path) -> None:
    """Reads pairs, or text with spans cut out, for a model with an encoder."""
    records, file = read_sides(path)
    inputs.windows = cut_sides(records, inputs.tokens, window=options.window)
    inputs.prompts = choose_sources(inputs.windows, count=options.generate)
    inputs.begins = first_labels(inputs.windows, inputs.tokens, count=options.generate)
    for record in records:
        inputs.texts += [record.pair.source, record.pair.target] if isinstance(record, PairRecord) else [record.text]
    inputs.text_file = asdict(file)


def check_comparable(model: Checkpoint, base: Checkpoint, inputs: Inputs) -> None:
    """Checks that the figures of two checkpoints are comparable.

    Raises:
        PlanError: If only one has an encoder, or their vocabularies or their tokenizers differ.
    """
    if model.has_encoder != base.has_encoder:
        raise PlanError(
            f"one of {model.source.label} and {base.source.label} has an encoder, so they cannot be compared.",
            hint="pass the checkpoint that the model was made from as `base`",
        )
    if model.vocab_size != base.vocab_size:
        raise PlanError(
            f"{model.source.label} has a vocabulary of {model.vocab_size} tokens and {base.source.label} of "
            f"{base.vocab_size}, so they cannot be compared.",
            hint="pass the checkpoint that the model was made from as `base`",
        )
    check_same(inputs.tokens, Tokens(base.source, vocab_size=base.vocab_size), inputs.texts)
