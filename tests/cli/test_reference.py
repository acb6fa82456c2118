"""Pages of the documentation say what the options and the code say."""

from places import ROOT

from hcsmoe_hub.cli.reference import reference
from hcsmoe_hub.layer.refit_block import STRENGTHS
from hcsmoe_hub.methods.refit.descent import BATCH_TOKENS, LEAST_STEPS, RATE, WARM_UP
from hcsmoe_hub.methods.refit.held_out import HELD_OUT_SHARE, STRETCH_TOKENS

NUMBERS = {8: "eight"}


def test_page_of_options_is_the_one_that_the_options_give():
    written = (ROOT / "docs" / "options.md").read_text("utf-8")
    assert written == reference(), "run: python -m hcsmoe_hub.cli.reference > docs/options.md"


def test_page_of_methods_names_the_numbers_of_the_refit():
    page = " ".join((ROOT / "docs" / "methods.md").read_text("utf-8").split())
    for words in (
        f"in batches of {BATCH_TOKENS} tokens",
        f"at least {LEAST_STEPS} batches",
        f"{RATE} / sqrt(fan-in)",
        f"the first {WARM_UP:.0%} of the steps".replace("%", " %"),
        ", ".join(f"{strength:.0%}".replace("%", " %") for strength in STRENGTHS[:-1]),
        f"One stretch of {STRETCH_TOKENS} tokens in {NUMBERS[HELD_OUT_SHARE]} of every domain",
    ):
        assert words in page
