"""Limits, licence and citations."""

from collections.abc import Iterator

from hcsmoe_hub.model_cards.facts import Facts
from hcsmoe_hub.model_cards.making import calibration_text
from hcsmoe_hub.model_cards.markdown import bullets, fence, joined, plural
from hcsmoe_hub.model_cards.metadata import OPEN_LICENSE, license_link
from hcsmoe_hub.model_cards.papers import HC_SMOE, M_SMOE, REAP, papers
from hcsmoe_hub.options import Layout
from hcsmoe_hub.result.source_card import Words

LICENSE_FILES = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY")


def limitations(facts: Facts) -> str:
    """The section on limits."""
    return f"## Limitations\n\n{bullets(_limits(facts))}"


def _limits(facts: Facts) -> Iterator[str]:
    experts = facts.report["experts"]
    if facts.changed:
        verb = "dropped" if facts.is_pruned else "merged"
        yield (
            f"Experts that differ were {verb}, so something of what they knew is gone. It may be facts, languages or "
            "skills that the calibration text hardly shows."
        )
        yield f"Calibrated on {calibration_text(facts)}: other text may lose more."
    if facts.refits:
        yield "The fit was judged on other parts of the text that it was made on, not on text of another kind."
    if facts.refits and REAP in papers(facts):
        yield f"{REAP.name} leaves experts as they are. Here they were fitted, so its results are of other models."
    if facts.layout is Layout.REDUCED and (kept := [paper for paper in papers(facts) if paper in (HC_SMOE, M_SMOE)]):
        names = joined([paper.name for paper in kept])
        yield (
            f"{names} {'keep' if len(kept) > 1 else 'keeps'} every router row. This checkpoint has one per merged "
            "expert, so published results are of other models."
        )
    if facts.layout is Layout.FULL:
        yield "It is as large as the base model: it saves nothing, and shows what merging does in any program."
    if facts.changed and facts.layout is Layout.REDUCED and experts["after"] == experts["per_token_after"]:
        yield f"Every token visits all {experts['after']} experts: the layers are dense, and the router only weighs."
    dead, total = sum(len(layer["dead_experts"]) for layer in facts.layers), len(facts.layers) * facts.experts_before
    if dead:
        yield f"No calibration token reached {dead} of the base model's {plural(total, 'expert')}."
    if not facts.measures:
        yield "Its quality was not measured."
    yield "Safety behaviour was not tested again, and may have changed with the rest."
    yield f"What the card of {facts.base.link} says of limits and intended use holds here too."


def _text(words: Words) -> str:
    return joined([f"`{word}`" for word in words]) if isinstance(words, list) else f"`{words}`"


def licence(facts: Facts) -> str:
    """The section on the licence."""
    return "\n\n".join(("## Licence", *_licence(facts)))


def _licence(facts: Facts) -> Iterator[str]:
    inherited, base = facts.inherited, facts.base
    files = sorted(file for file in facts.files if file.upper().startswith(LICENSE_FILES))
    link = license_link(facts)
    if inherited.license is not None:
        name = inherited.license_name or ("" if inherited.license != OPEN_LICENSE else "a licence without a name")
        text = f"{name} (`{OPEN_LICENSE}`)" if inherited.license == OPEN_LICENSE else _text(inherited.license)
        yield f"That of the base model: {text}{f', [{link}]({link})' if link else ''}."
    elif "license" in facts.report["source"]:
        yield f"The card of {base.link} names no licence. Ask its owners before you use or share this model."
    else:
        yield f"Not recorded. That of {base.link} holds for this model too."
    if others := [file for file in files if inherited.license is None or file != link]:
        yield f"Its files came along: {joined([f'[{file}]({file})' for file in others])}."
    if inherited.gated:
        yield f"{base.link} is gated: who downloads it agrees to the conditions on its page, and they hold here too."


def citation(facts: Facts) -> str:
    """The section on citations; empty if there is nothing to cite."""
    entries = [fence("bibtex", paper.bibtex) for paper in papers(facts)]
    base = "" if facts.base.repo_id is None else f"Base model: {facts.base.link}"
    parts = [*entries, *([base] if base else [])]
    return "\n\n".join(("## Citation", *parts)) if parts else ""
