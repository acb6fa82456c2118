"""Calibration text to token ids: packed sequences of equal length, without padding.

Padding tokens would count in every expert's statistics, so documents are joined and cut instead.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hcsmoe_hub.calibration.calibration_set import CalibrationSet
from hcsmoe_hub.calibration.conversations import UnreadableError
from hcsmoe_hub.calibration.documents import Document, Row, find_document, is_known, read_document
from hcsmoe_hub.calibration.encode import Encoder
from hcsmoe_hub.calibration.library_failures import reason_of
from hcsmoe_hub.calibration.plan import CalibrationPlan
from hcsmoe_hub.calibration.rows import read_rows
from hcsmoe_hub.calibration.sources import BUNDLED, C4, TextSource
from hcsmoe_hub.calibration.token_ids import check_vocabulary, open_token_ids
from hcsmoe_hub.calibration.tokenizer import load_tokenizer, repair_hint
from hcsmoe_hub.errors import CalibrationError
from hcsmoe_hub.events import Listener, Warned, ignore


def load_calibration(
    plan: CalibrationPlan, *, tokenizer_folder: Path, vocab_size: int, emit: Listener = ignore
) -> CalibrationSet:
    """Loads the calibration tokens with the domain of every sequence; arguments and errors as in ``load_token_ids``."""
    ids = load_token_ids(plan, tokenizer_folder=tokenizer_folder, vocab_size=vocab_size, emit=emit)
    return CalibrationSet.of(ids, plan.domains(len(ids)))


def load_token_ids(
    plan: CalibrationPlan, *, tokenizer_folder: Path, vocab_size: int, emit: Listener = ignore
) -> Tensor:
    """Loads the calibration tokens.

    Args:
        plan: What to load.
        tokenizer_folder: Folder with the source's tokenizer files.
        vocab_size: Ids must be below this.
        emit: Called with a warning where rows were left out, or where one of several sources is too short.

    Returns:
        ``[sequences, sequence_length]`` int64. If a text is short, there are fewer sequences than planned; those of
        several sources keep their shares, and their order is ``plan.order(sequences)``.

    Raises:
        CalibrationError: If the text is too short for one sequence, or an id is outside the vocabulary.
    """
    if plan.is_token_ids:
        ids = torch.from_numpy(np.array(open_token_ids(plan.sources[0].path)))
        check_vocabulary(ids, vocab_size=vocab_size, label=plan.dataset, hint="use ids from this model's own tokenizer")
        return ids
    tokenizer = load_tokenizer(tokenizer_folder, _explain_tokenizer)
    wanted = plan.counts(plan.sequences)
    packed = []
    for source, count in zip(plan.sources, wanted, strict=True):
        stream = _fill(plan, source, count * plan.sequence_length, tokenizer=tokenizer, emit=emit)
        check_vocabulary(
            stream, vocab_size=vocab_size, label=source.text, hint="use the tokenizer that belongs to this model"
        )
        packed.append(stream.view(-1, plan.sequence_length))
    return packed[0] if len(packed) == 1 else _mix(plan, packed, emit)


def _explain_tokenizer(error: BaseException) -> CalibrationError:
    return CalibrationError(
        f"the model's tokenizer cannot be loaded: {reason_of(error)}",
        hint=f"{repair_hint(error)}, or pass token ids with `dataset='IDS.npy'`",
    )


def _fill(plan: CalibrationPlan, source: TextSource, tokens: int, *, tokenizer: Any, emit: Listener) -> Tensor:
    """Joins the documents of one source until there are enough tokens, and cuts them to whole sequences."""
    # C4 follows the papers, which join documents without a separator.
    separator = [] if source.location == C4 or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoder = Encoder(tokenizer, source.text, separator=separator)
    stream: list[int] = []
    for document in _documents(plan, source):
        if isinstance(document, UnreadableError):
            stream += encoder.skip_unreadable(str(document))
        else:
            stream += encoder.encode(document)
        if len(stream) >= tokens:
            break
    encoder.check()
    sequences = min(len(stream), tokens) // plan.sequence_length
    left_out = f" (rows left out: {encoder.account()})" if encoder.faults else ""
    if sequences == 0:
        raise CalibrationError(
            f"{source.text} gives {len(stream)} tokens, fewer than one sequence of {plan.sequence_length}{left_out}.",
            hint="pass more text, or a smaller `sequence_length`",
        )
    if encoder.faults:
        emit(Warned(f"rows of {source.name} left out: {encoder.account()}."))
    return torch.tensor(stream[: sequences * plan.sequence_length])


def _mix(plan: CalibrationPlan, packed: list[Tensor], emit: Listener) -> Tensor:
    """Puts the sequences of several sources in order; if one is short, there are fewer of all, with the same shares."""
    found, order = [len(sequences) for sequences in packed], plan.order(plan.sequences)
    rows, counts = [], [0] * len(packed)
    for index in order:
        if counts[index] == found[index]:
            emit(
                Warned(
                    f"{plan.sources[index].name} fills only {found[index]} sequences, so the other sources are cut to "
                    f"keep their shares."
                )
            )
            break
        rows.append(packed[index][counts[index]])
        counts[index] += 1
    if 0 in counts:
        raise CalibrationError(
            f"{plan.sources[counts.index(0)].text} would have no sequence, because other sources are too short for "
            "their shares.",
            hint="give a larger share to the sources that have more text",
        )
    return torch.stack(rows)


def _documents(plan: CalibrationPlan, source: TextSource) -> Iterator[Document | UnreadableError]:
    """Documents in shuffled order, without blank ones; or why a row holds none."""
    # A column that the user's own files have is not one of the texts that are always there.
    is_own = len(plan.sources) == 1 or source.location not in (BUNDLED, C4)
    column = plan.text_column if is_own else None
    for row in read_rows(source, seed=plan.seed):
        try:
            document = _document(row, source, column)
        except UnreadableError as error:
            yield error
            continue
        if document is not None:
            yield document


def _document(row: Row, source: TextSource, column: str | None) -> Document | None:
    """The document of a row; ``None`` if it is blank: different rows may use different columns."""
    if column is None:
        if not is_known(row):
            raise CalibrationError(
                f"{source.text} has no text: its columns are {', '.join(row)}.",
                hint="name the column that holds the text with `text_column`",
            )
        return find_document(row)
    if column not in row:
        raise CalibrationError(
            f"{source.text} has no column {column!r}: its columns are {', '.join(row)}.",
            hint="name one of them with `text_column`",
        )
    return read_document(row, column) if row[column] else None
