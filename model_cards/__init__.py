"""Model cards: what a conversion did and what was measured of its result, as the README.md of that result."""

from hcsmoe_hub.model_cards.write import HELD_OUT_TEXT, WrittenCard, write_card

__all__ = ["HELD_OUT_TEXT", "WrittenCard", "write_card"]
