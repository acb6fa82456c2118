"""Model cards: what a conversion did and what was measured of it, as the README.md of the result."""

from hcsmoe_hub.model_cards.write import WrittenCard, write_card

__all__ = ["WrittenCard", "write_card"]
