"""Fills the template of a card, ``card.md.jinja``, with what is known of a result."""

import re
from collections.abc import Mapping
from functools import cache
from types import SimpleNamespace

from jinja2 import Environment, PackageLoader, StrictUndefined

from hcsmoe_hub.machine.units import (
    format_bytes,
    format_change,
    format_count,
    format_list,
    format_percent,
    format_plural,
)
from hcsmoe_hub.model_cards import closing, provenance, quality, recovered
from hcsmoe_hub.model_cards.card_data import CardData
from hcsmoe_hub.model_cards.command import convert_command, evaluate_command
from hcsmoe_hub.model_cards.metadata import front_matter
from hcsmoe_hub.model_cards.papers import papers
from hcsmoe_hub.model_cards.quantising import quantising
from hcsmoe_hub.model_cards.usage import usage
from hcsmoe_hub.options import FormerRefit, Refit
from hcsmoe_hub.recipe.words import BUDGETS, PROPAGATIONS, REFITS, SALIENCIES, compression, grouping, merging, routing

TEMPLATE = "card.md.jinja"
# Where a sentence goes on after a line of the template that ends within it.
_SPACE_BEFORE_MARK = re.compile(r"\s+(?=[.,:;](?:\s|$))")


def render_body(card: CardData, kept_sections: str) -> str:
    """Text of a card, front matter first.

    Args:
        card: What is known of the result.
        kept_sections: What a person wrote, between its markers; it is copied as it is.
    """
    text = (
        _environment()
        .get_template(TEMPLATE)
        .render(
            front_matter=front_matter(card).to_yaml(),
            card=card,
            base=card.base,
            report=card.report,
            experts=card.report.experts,
            papers=papers(card),
            words=_words(card),
            usage=usage(card),
            quantising=quantising(card),
            commands=_commands(card),
            kept_sections=kept_sections,
            quality=quality,
            provenance=provenance,
            recovered=recovered,
            closing=closing,
        )
    )
    return text.rstrip() + "\n"


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("hcsmoe_hub.model_cards", ""),
        undefined=StrictUndefined,
        # A card is Markdown: what HTML would need escaped is not escaped in code blocks.
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "bytes": format_bytes,
        "cell": cell,
        "change": _change,
        "count": format_count,
        "listed": format_list,
        "paragraph": paragraph,
        "percent": format_percent,
        "plural": format_plural,
    }
    return environment


def cell(text: str) -> str:
    """A text for a table: neither a bar nor a line break of it may end the cell."""
    return " ".join(text.split()).replace("|", "\\|")


def paragraph(text: str) -> str:
    """Joins the lines of a paragraph, or of each bullet of a list, into one; marks move up to the word before."""
    bullets: list[list[str]] = []
    for line in text.splitlines():
        if line.startswith("- ") or not bullets:
            bullets.append([])
        bullets[-1] += line.split()
    return "\n".join(_SPACE_BEFORE_MARK.sub("", " ".join(words)) for words in bullets if words)


def _change(change: Mapping[str, int]) -> str:
    """By how much a number changed, as a remark; empty if it did not."""
    percents = format_change(change)
    return f" ({percents})" if percents else ""


def _commands(card: CardData) -> dict[str, str]:
    """What makes the result again, and what measures it."""
    found = {"convert": convert_command(card), "evaluate": evaluate_command(card)}
    return found if card.report.recovery is None else found | {"recover": recovered.recover_command(card)}


def _words(card: CardData) -> SimpleNamespace:
    """The recipe in sentences."""
    recipe = card.recipe
    return SimpleNamespace(
        saliency="" if recipe.saliency is None else SALIENCIES[recipe.saliency].card,
        grouping=grouping(recipe),
        merging=merging(recipe),
        budget=BUDGETS[recipe.budget].card,
        routing=routing(recipe),
        refit=_refit(card),
        compression=compression(recipe),
        propagation="" if recipe.propagate is None else PROPAGATIONS[recipe.propagate].card,
    )


def _refit(card: CardData) -> str:
    """What was refitted, and where."""
    kept, choice = card.refits, card.recipe.refit or Refit.NONE
    # The first round of least squares is that of the down projections alone.
    if choice is FormerRefit.EXPERTS and all(refit.rounds is not None and refit.rounds <= 1 for refit in kept):
        choice = Refit.DOWN
    where = "" if len(kept) == len(card.changed) else f" in {len(kept)} of {format_plural(len(card.changed), 'layer')}"
    return REFITS[choice].card.format(where=where)
