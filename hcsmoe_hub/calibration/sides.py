"""Prepares sources of text for models with an encoder and a decoder: pairs as they are, text with spans cut out."""

from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import Any

from hcsmoe_hub.calibration.conversations import Conversation
from hcsmoe_hub.calibration.denoising import corruption_to
from hcsmoe_hub.calibration.domain_text import DomainText
from hcsmoe_hub.calibration.encode import Encoder
from hcsmoe_hub.calibration.encode_sides import SidesEncoder, refused_chat
from hcsmoe_hub.calibration.pair_tokens import PairIds, find_sentinels
from hcsmoe_hub.calibration.pairs import Pair, UnpairedError
from hcsmoe_hub.calibration.plan import CalibrationPlan
from hcsmoe_hub.calibration.reading import Prepared, Reading
from hcsmoe_hub.calibration.sided_text import DenoisedText, Denoiser, PairText
from hcsmoe_hub.calibration.source_text import Item
from hcsmoe_hub.calibration.templates import Templates
from hcsmoe_hub.errors import CalibrationError

# Documents of each source that show whether it holds pairs, and how long sources and targets are.
_PEEKED = 1000


def prepare_sides(
    plan: CalibrationPlan, items: Sequence[Iterator[Item]], *, tokenizer: Any, templates: Templates
) -> Prepared:
    """Finds out whether sources hold pairs or text, and splits sequences between the encoder and the decoder.

    Args:
        plan: A plan for a model with an encoder.
        items: Documents of every source, in shuffled order.
        tokenizer: The tokenizer of transformers.
        templates: Of the same tokenizer.

    Raises:
        CalibrationError: If some sources hold pairs and others text, one holds conversations, the tokenizer has no
            sentinels for spans that are cut out of text, or sequences are too short.
    """
    peeked = [list(islice(own, _PEEKED)) for own in items]
    are_pairs = _are_pairs(plan, peeked)
    encoders = [
        SidesEncoder(tokenizer, source.text, templates=templates, are_pairs=are_pairs) for source in plan.sources
    ]
    cut: DomainText
    if are_pairs:
        fresh = [SidesEncoder(tokenizer, one.text, templates=templates, are_pairs=True) for one in plan.sources]
        source_length = plan.source_length if plan.is_split else _source_length(plan, peeked, fresh)
        cut = PairText("", (source_length, plan.sequence_length - source_length))
    else:
        denoiser = _denoiser(plan, tokenizer)
        cut, source_length = DenoisedText("", denoiser), denoiser.corruption.source_length
    readings = [
        Reading(chain(first, rest), encoder) for first, rest, encoder in zip(peeked, items, encoders, strict=True)
    ]
    return Prepared(readings=readings, cut=cut, source_length=source_length, are_pairs=are_pairs)


def _are_pairs(plan: CalibrationPlan, peeked: Sequence[Sequence[Item]]) -> bool:
    """Whether the sources hold pairs, by the first document of each."""
    kinds = dict[str, bool]()
    for source, items in zip(plan.sources, peeked, strict=True):
        documents = [document for _, document in items if isinstance(document, Pair | UnpairedError | str)]
        if any(isinstance(document, Conversation) for _, document in items[:1]):
            raise refused_chat(source.text)
        if documents:
            kinds[source.text] = not isinstance(documents[0], str)
    if len(set(kinds.values())) > 1:
        pairs, text = (next(name for name, kind in kinds.items() if kind is wanted) for wanted in (True, False))
        raise CalibrationError(
            f"{pairs} holds pairs of source and target, but {text} holds text: their sequences cannot be split alike.",
            hint="calibrate on one kind",
        )
    return any(kinds.values())


def _source_length(plan: CalibrationPlan, peeked: Sequence[Sequence[Item]], encoders: Sequence[Encoder]) -> int:
    """Tokens of the source in each sequence, by the lengths of both sides in the first pairs."""
    sides = [0, 0]
    for items, encoder in zip(peeked, encoders, strict=True):
        for _, document in items:
            if isinstance(document, Pair) and isinstance(ids := encoder.encode(document), PairIds):
                sides = [sides[0] + len(ids.source), sides[1] + len(ids.target)]
    share = sides[0] / sum(sides) if sum(sides) else 0.5
    return min(max(1, round(plan.sequence_length * share)), plan.sequence_length - 1)


def _denoiser(plan: CalibrationPlan, tokenizer: Any) -> Denoiser:
    if plan.is_split:
        raise CalibrationError(
            f"{plan.dataset} holds text, which is split where spans are cut out of it, so `source_length` has no use.",
            hint="leave `source_length` out, or pass pairs of source and target",
        )
    sentinels = find_sentinels(tokenizer)
    if not sentinels or tokenizer.eos_token_id is None:
        raise CalibrationError(
            f"{plan.dataset} holds text, but the model's tokenizer has no sentinels (<extra_id_0> and so on) that "
            "stand for the spans which a model trained like T5 fills in.",
            hint='pass pairs: rows such as {"source": "...", "target": "..."}',
        )
    corruption = corruption_to(plan.sequence_length)
    if corruption is None or corruption.spans > len(sentinels):
        limit = "too few for any text" if corruption is None else f"too many for {len(sentinels)} sentinels"
        raise CalibrationError(
            f"sequences of {plan.sequence_length} tokens are {limit}.",
            hint=f"use a {'larger' if corruption is None else 'smaller'} `sequence_length`",
        )
    return Denoiser(corruption=corruption, sentinels=sentinels, end=tokenizer.eos_token_id, seed=plan.seed)
