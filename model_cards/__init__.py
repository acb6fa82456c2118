"""Model cards: what a conversion did and what was measured of it, as the README.md of the result."""

from hcsmoe_hub.model_cards.write import BENCHMARK_FILE, CARD_FILE, WrittenCard, write_card

__all__ = ["BENCHMARK_FILE", "CARD_FILE", "WrittenCard", "write_card"]
