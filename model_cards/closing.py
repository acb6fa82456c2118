"""What the closing sections of a card need to know: limits, licence and citations."""

from dataclasses import dataclass

from hcsmoe_hub.checkpoint.sidecars import is_legal
from hcsmoe_hub.machine.units import format_list
from hcsmoe_hub.model_cards.card_data import CardData
from hcsmoe_hub.model_cards.metadata import OPEN_LICENSE, license_link
from hcsmoe_hub.model_cards.papers import HC_SMOE, M_SMOE, papers
from hcsmoe_hub.options import Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Licence:
    """The licence of a result, which is its base model's.

    Attributes:
        text: Its identifiers, or its name; empty if the base model names none.
        link: Where its text is.
        is_recorded: Whether the card of the base model could be read.
        files: Files about it that were copied along, other than the link.
    """

    text: str
    link: str | None
    is_recorded: bool
    files: list[str]


def licence(card: CardData) -> Licence:
    """The licence of a result."""
    inherited, link = card.inherited, license_link(card)
    files = sorted(file for file in card.files if is_legal(file))
    return Licence(
        text=_licence_text(card),
        link=link,
        is_recorded="license" in card.report.source,
        files=[file for file in files if inherited.license is None or file != link],
    )


def _licence_text(card: CardData) -> str:
    inherited = card.inherited
    if inherited.license is None:
        return ""
    if inherited.license == OPEN_LICENSE:
        return f"{inherited.license_name or 'a licence without a name'} (`{OPEN_LICENSE}`)"
    words = inherited.license if isinstance(inherited.license, list) else [inherited.license]
    return format_list([f"`{word}`" for word in words])


def papers_of_full_routers(card: CardData) -> list[str]:
    """Names of the methods in force whose papers keep every router row, where this result does not."""
    if card.layout not in (Layout.REDUCED, Layout.FACTORED):
        return []
    return [paper.name for paper in papers(card) if paper in (HC_SMOE, M_SMOE)]


def is_dense(card: CardData) -> bool:
    """Whether every expert is active for every token."""
    experts = card.report.experts
    is_reduced = card.layout in (Layout.REDUCED, Layout.FACTORED)
    return bool(card.changed) and is_reduced and experts["after"] == experts["per_token_after"]


def unused_experts(card: CardData) -> int:
    """Experts of the base model that no calibration token was routed to."""
    return sum(len(layer.dead_experts) for layer in card.layers)
