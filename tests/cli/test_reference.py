"""Pages of the documentation say what the options and the code say."""

from places import ROOT

from hcsmoe_hub.cli.reference import reference
from hcsmoe_hub.layer.refit_block import RATE
from hcsmoe_hub.layer.refit_experts import PATIENCE
from hcsmoe_hub.methods.refit.cost import BLOCK_STEP_TOKENS, BLOCK_STEPS
from hcsmoe_hub.methods.refit.experts import ROUNDS, STEP_TOKENS
from hcsmoe_hub.methods.refit.held_out import HELD_OUT_SHARE, STRETCH_TOKENS

NUMBERS = {3: "three", 8: "eight"}


def test_page_of_options_is_the_one_that_the_options_give():
    written = (ROOT / "docs" / "options.md").read_text("utf-8")
    assert written == reference(), "run: python -m hcsmoe_hub.cli.reference > docs/options.md"


def test_page_of_methods_names_the_numbers_of_the_refit():
    page = " ".join((ROOT / "docs" / "methods.md").read_text("utf-8").split())
    for words in (
        f"continues with up to {ROUNDS} rounds",
        f"a seeded sample of {STEP_TOKENS} tokens",
        f"end early after {NUMBERS[PATIENCE]} in a row without a lower error on held-out text",
        f"takes {BLOCK_STEPS} steps of Adam",
        f"each on {BLOCK_STEP_TOKENS} tokens",
        f"to at most {RATE:.0%}".replace("%", " %"),
        f"One stretch of {STRETCH_TOKENS} calibration tokens in {NUMBERS[HELD_OUT_SHARE]}",
    ):
        assert words in page
