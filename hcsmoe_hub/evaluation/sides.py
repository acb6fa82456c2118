"""Evaluation files for models with an encoder: pairs of source and target, or text whose spans are cut out."""

from collections.abc import Iterator, Sequence

from hcsmoe_hub.calibration.denoising import LEAST_TOKENS, Corruption, corrupt, corruption_of, corruption_to
from hcsmoe_hub.calibration.pair_tokens import find_sentinels
from hcsmoe_hub.calibration.pairs import Pair
from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.evaluation.choices import Scored
from hcsmoe_hub.evaluation.loops import Prompt
from hcsmoe_hub.evaluation.perplexity import Window
from hcsmoe_hub.evaluation.records import ChoiceItem, PairRecord, TextRecord
from hcsmoe_hub.evaluation.tokens import Tokens

# The same spans are cut out in every evaluation.
_SEED = 0


def cut_sides(records: Sequence[TextRecord | PairRecord], tokens: Tokens, *, window: int) -> list[Window]:
    """Sources with the targets that are predicted from them.

    Args:
        records: Pairs, which are taken as they are, and text, which is cut into pieces that are corrupted like the text
            that T5 was pretrained on.
        tokens: Tokenizer of the model.
        window: Tokens of source and target together that a piece of text becomes; the last one may be shorter.

    Raises:
        PlanError: If there is text, but the tokenizer has no sentinels or the window is too short for them.
    """
    windows = []
    for record in records:
        if isinstance(record, PairRecord):
            ids = tokens.encode_pair(record.pair)
            windows.append(Window(record.domain, ids.target, ids.source))
        else:
            windows += _pieces(record, tokens, window)
    return windows


def _pieces(record: TextRecord, tokens: Tokens, window: int) -> Iterator[Window]:
    sentinels, last = find_sentinels(tokens.tokenizer), tokens.last
    if not sentinels or last is None:
        raise PlanError(
            "the text has no targets, and the model's tokenizer has no sentinels (<extra_id_0> and so on) that stand "
            "for spans which are cut out of it.",
            hint='pass pairs: lines such as {"source": "...", "target": "..."}',
        )
    whole = corruption_to(window)
    if whole is None or whole.spans > len(sentinels):
        raise PlanError(
            f"windows of {window} tokens are too {'short' if whole is None else 'long'} to cut spans out of them.",
            hint=f"use a {'larger' if whole is None else 'smaller'} `window`",
        )
    ids = tokens.encode(record.text)
    for start in range(0, len(ids), whole.tokens):
        piece = ids[start : start + whole.tokens]
        if len(piece) >= LEAST_TOKENS:
            how = _corruption(len(piece), whole)
            source, target = corrupt(piece, how, sentinels=sentinels, end=last, seed=_SEED)
            yield Window(record.domain, target, source)


def _corruption(tokens: int, whole: Corruption) -> Corruption:
    return whole if tokens == whole.tokens else corruption_of(tokens)


def choose_sources(windows: Sequence[Window], *, count: int) -> list[Prompt]:
    """Sources to continue from, evenly spaced.

    Raises:
        PlanError: If there are fewer.
    """
    if count > len(windows):
        raise PlanError(
            f"{count} sources were requested, but there are only {len(windows)}.",
            hint=f"use `generate={len(windows)}` or less",
        )
    chosen = [windows[number * len(windows) // count] for number in range(count)]
    return [(window.domain, list(window.source)) for window in chosen]


def first_labels(windows: Sequence[Window], tokens: Tokens, *, count: int) -> list[list[int]]:
    """What the decoder is given of each chosen target: its language, where the tokenizer marks that."""
    chosen = [windows[number * len(windows) // count] for number in range(count)]
    return [list(window.ids[:1]) if tokens.has_languages else [] for window in chosen]


def choice_sides(item: ChoiceItem, tokens: Tokens) -> list[tuple[Scored, Scored]]:
    """Every choice of an item as the target of its context, and of an empty source, each as a pair."""

    def scored(context: str, choice: str) -> Scored:
        ids = tokens.encode_pair(Pair(source=context, target=choice, row="a question"))
        # An encoder has to read something.
        return tuple(ids.source or [tokens.first]), tuple(ids.target)

    return [(scored(item.context, choice), scored("", choice)) for choice in item.choices]
