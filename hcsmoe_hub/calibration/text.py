"""Calibration text to token ids: packed sequences of equal length, without padding.

Padding tokens would count in every expert's statistics, so documents are joined and cut instead, those of each domain
apart from the others.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hcsmoe_hub.calibration.calibration_set import CalibrationSet
from hcsmoe_hub.calibration.completions import sample_from_server
from hcsmoe_hub.calibration.domain_text import DomainText, TokenIds
from hcsmoe_hub.calibration.encode import Encoder
from hcsmoe_hub.calibration.items import read_items
from hcsmoe_hub.calibration.library_failures import reason_of
from hcsmoe_hub.calibration.measured import Part, find_measured, hold_back
from hcsmoe_hub.calibration.plan import CalibrationPlan
from hcsmoe_hub.calibration.reading import Prepared, Reading
from hcsmoe_hub.calibration.shares import interleave_counts
from hcsmoe_hub.calibration.sides import prepare_sides
from hcsmoe_hub.calibration.source_text import BUNDLED_WEIGHTS, Item, SourceText
from hcsmoe_hub.calibration.sources import BUNDLED, C4, SELF, TextSource
from hcsmoe_hub.calibration.templates import Templates
from hcsmoe_hub.calibration.token_ids import check_vocabulary, open_token_ids
from hcsmoe_hub.calibration.tokenizer import load_tokenizer, repair_hint
from hcsmoe_hub.errors import CalibrationError
from hcsmoe_hub.events import Listener, Warned, ignore

# Samples documents from the source model without end, as token ids; takes a seed.
Sampler = Callable[[int], Iterator[TokenIds]]


def load_calibration(
    plan: CalibrationPlan,
    *,
    tokenizer_folder: Path,
    vocab_size: int,
    sample: Sampler | None = None,
    emit: Listener = ignore,
) -> CalibrationSet:
    """Loads the calibration tokens, and those to measure on.

    Args:
        plan: What to load.
        tokenizer_folder: Folder with the source's tokenizer files.
        vocab_size: Ids must be below this.
        sample: Samples from the source model; needed if ``self`` is among the sources.
        emit: Called with a warning where rows were left out, or where one of several sources is too short.

    Returns:
        The set. If a text is short, there are fewer sequences than planned; those of several sources keep their shares,
        and their order is that of ``plan.order``.

    Raises:
        CalibrationError: If the text is too short for one sequence, or an id is outside the vocabulary.
    """
    if plan.is_token_ids:
        ids = torch.from_numpy(np.array(open_token_ids(plan.sources[0].path)))
        check_vocabulary(ids, vocab_size=vocab_size, label=plan.dataset, hint="use ids from this model's own tokenizer")
        return CalibrationSet.of(ids, [plan.sources[0].domain] * len(ids), plan.source_length)
    tokenizer = load_tokenizer(tokenizer_folder, _explain_tokenizer)
    texts, counts = [], []
    with Templates(tokenizer_folder) as templates:
        items = [_items(plan, source, tokenizer=tokenizer, sample=sample) for source in plan.sources]
        if plan.source_length:
            how = prepare_sides(plan, items, tokenizer=tokenizer, templates=templates)
        else:
            how = _prepare(plan, items, tokenizer=tokenizer, templates=templates)
        for index, wanted in enumerate(plan.counts(plan.sequences)):
            text, found = _fill(plan.sources[index], wanted, how.readings[index], cut=how.cut, emit=emit)
            texts.append(text)
            counts.append(found)
        parts, order = _mix(plan, texts, counts, emit)
        if plan.measures:
            find_measured(parts, texts)
            if plan.holds_back:
                hold_back(parts)
        if plan.held_out is not None:
            hold_back(parts, plan.held_out)
    assembled = _assemble(plan, parts, order, vocab_size=vocab_size)
    return replace(assembled, source_length=how.source_length, are_pairs=how.are_pairs)


def _prepare(
    plan: CalibrationPlan, items: Sequence[Iterator[Item]], *, tokenizer: Any, templates: Templates
) -> Prepared:
    """What is read of the sources for a model that has a decoder alone."""
    readings = []
    for source, own in zip(plan.sources, items, strict=True):
        # C4 follows the papers, which join documents without a separator.
        separator = [] if source.location == C4 or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        readings.append(Reading(own, Encoder(tokenizer, source.text, separator=separator, templates=templates)))
    return Prepared(readings=readings, cut=DomainText("", plan.sequence_length), source_length=0)


def _explain_tokenizer(error: BaseException) -> CalibrationError:
    return CalibrationError(
        f"the model's tokenizer cannot be loaded: {reason_of(error)}",
        hint=f"{repair_hint(error)}, or pass token ids with `dataset='IDS.npy'`",
    )


def _items(plan: CalibrationPlan, source: TextSource, *, tokenizer: Any, sample: Sampler | None) -> Iterator[Item]:
    """The documents of one source; what a model writes has no end, and is one domain."""
    if source.location == SELF:
        assert sample is not None, "the caller samples from the source model"
        yield from (("", document) for document in sample(plan.seed))
    elif source.is_server:
        # An empty prompt works only where the tokenizer adds the begin token.
        begin = "" if tokenizer("")["input_ids"] else tokenizer.bos_token or tokenizer.eos_token or ""
        yield from (("", text) for text in sample_from_server(source.location, seed=plan.seed, begin=begin))
    else:
        # A column that the user's own files have is not one of the texts that are always there.
        is_own = len(plan.sources) == 1 or source.location not in (BUNDLED, C4)
        column = plan.text_column if is_own else None
        yield from read_items(source, seed=plan.seed, column=column, sides=plan.source_length > 0)


def _fill(
    source: TextSource, sequences: int, reading: Reading, *, cut: DomainText, emit: Listener
) -> tuple[SourceText, dict[str, int]]:
    """Reads one source until there is enough text; returns it with the number of sequences of each domain."""
    encoder = reading.encoder
    weights = BUNDLED_WEIGHTS if source.location == BUNDLED else None
    text = SourceText(reading.items, encoder, cut=cut, weights=weights)
    counts = text.fill(sequences)
    encoder.check()
    left_out = f" (rows left out: {encoder.account()})" if encoder.faults else ""
    if not counts:
        raise CalibrationError(
            f"{source.text} gives {text.tokens} tokens, fewer than {cut.wanted}{left_out}.",
            hint="pass more text, or a smaller `sequence_length`",
        )
    if encoder.faults:
        emit(Warned(f"rows of {source.name} left out: {encoder.account()}."))
    return text, counts


def _mix(
    plan: CalibrationPlan, texts: Sequence[SourceText], counts: Sequence[dict[str, int]], emit: Listener
) -> tuple[list[Part], list[int]]:
    """Puts the sequences of all domains in order; if a source is short, there are fewer of all, with the same shares.

    Returns:
        The domains, and the index of the domain of each sequence.
    """
    found = [sum(own.values()) for own in counts]
    used = _cut(plan, found, emit)
    orders = []
    parts: list[Part] = []
    for source, own in enumerate(counts):
        names = list(own)
        order = interleave_counts(list(own.values()))[: used.count(source)]
        numbers = {index: len(parts) + number for number, index in enumerate(dict.fromkeys(order))}
        for index in numbers:
            text = texts[source].domains[names[index]]
            rest = text.like(text.name)
            parts.append(Part(domain=text.name, source=source, text=text, count=order.count(index), rest=rest))
        orders.append(iter([numbers[index] for index in order]))
    _name(plan, parts)
    return parts, [next(orders[source]) for source in used]


def _cut(plan: CalibrationPlan, found: Sequence[int], emit: Listener) -> list[int]:
    """The source of each sequence, until one that comes next has no more."""
    used: list[int] = []
    if len(found) == 1:
        return [0] * found[0]
    counts = [0] * len(found)
    for source in plan.order(plan.sequences):
        if counts[source] == found[source]:
            emit(
                Warned(
                    f"{plan.sources[source].name} fills only {found[source]} sequences, so the other sources are cut "
                    f"to keep their shares."
                )
            )
            break
        used.append(source)
        counts[source] += 1
    if 0 in counts:
        raise CalibrationError(
            f"{plan.sources[counts.index(0)].text} would have no sequence, because other sources are too short for "
            "their shares.",
            hint="give a larger share to the sources that have more text",
        )
    return used


def _name(plan: CalibrationPlan, parts: Sequence[Part]) -> None:
    """Gives every domain a name of its own; that of its source, if the source is one domain."""
    names = [part.text.name or plan.sources[part.source].domain for part in parts]
    seen = Counter(names)
    for part, name in zip(parts, names, strict=True):
        part.domain = f"{plan.sources[part.source].domain}: {name}" if seen[name] > 1 else name


def _assemble(plan: CalibrationPlan, parts: Sequence[Part], order: Sequence[int], *, vocab_size: int) -> CalibrationSet:
    """Cuts the text into sequences, and checks their token ids."""
    packed, measured = [part.text.pack(part.count) for part in parts], [part.rest.pack(part.measured) for part in parts]
    for part, *tensors in zip(parts, packed, measured, strict=True):
        check_vocabulary(
            torch.cat(tensors),
            vocab_size=vocab_size,
            label=plan.sources[part.source].text,
            hint="use the tokenizer that belongs to this model",
        )
    # What is held back comes from the end of each domain.
    counts, calibrated = [0] * len(parts), list[int]()
    for number in order:
        counts[number] += 1
        if counts[number] <= parts[number].count:
            calibrated.append(number)
    measuring = interleave_counts([part.measured for part in parts])
    return CalibrationSet(
        token_ids=_arrange(packed, calibrated),
        domains=tuple(parts[number].domain for number in calibrated),
        measured_ids=_arrange(measured, measuring),
        measured_domains=tuple(parts[number].domain for number in measuring),
        sources=tuple(parts[number].source for number in calibrated),
    )


def _arrange(packed: Sequence[Tensor], order: Sequence[int]) -> Tensor:
    """Sequences of several domains, ``[len(order), sequence_length]`` int64, each domain's own in their order."""
    if not order:
        return packed[0].new_empty(0, packed[0].shape[1])
    sequences = [iter(tensor) for tensor in packed]
    return torch.stack([next(sequences[number]) for number in order])
