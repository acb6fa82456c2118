"""What a result is: one paragraph, and what it has before and after in a table."""

from collections.abc import Iterator
from statistics import fmean

from hcsmoe_hub.machine.units import format_bytes, format_count
from hcsmoe_hub.model_cards.facts import Document, Facts, experts_of
from hcsmoe_hub.model_cards.markdown import plural, table, with_change
from hcsmoe_hub.model_cards.papers import papers
from hcsmoe_hub.model_cards.words import BUDGETS, REFITS, SALIENCIES, grouping, merging, words_of
from hcsmoe_hub.options import Layout, Refit


def experts_left(facts: Facts, *, changed_only: bool = False) -> str:
    """Distinct experts per layer that are left: ``4``, or ``3 to 6 (4.5 on average)``."""
    counts = [experts_of(layer) for layer in (facts.changed if changed_only else facts.layers)]
    least, greatest = min(counts), max(counts)
    return str(least) if least == greatest else f"{least} to {greatest} ({fmean(counts):.4g} on average)"


def where(facts: Facts) -> str:
    """The layers that have fewer experts."""
    changed, layers = len(facts.changed), len(facts.layers)
    return (
        f"{changed} of {plural(layers, 'MoE layer')}"
        if changed < layers
        else ("its only MoE layer" if layers == 1 else f"each of its {layers} MoE layers")
    )


def description(facts: Facts) -> str:
    """The first paragraph: what it is, and how it came about."""
    is_fitted = bool(facts.refits) or any(layer["router"].get("is_fitted") for layer in facts.layers)
    training = "The model as a whole was not trained." if is_fitted else "No training was done."
    others = "All other weights are the base model's." if facts.changed else ""
    return " ".join(part for part in (_what(facts), *_how(facts), others, training) if part)


def _what(facts: Facts) -> str:
    base, before = facts.base.link, facts.experts_before
    if not facts.changed:
        done = "dropped" if facts.is_pruned else "merged"
        return f"{base} with all {before} experts of every MoE layer: nothing was {done}."
    left, layers = experts_left(facts, changed_only=True), where(facts)
    if facts.is_pruned:
        return f"{base} with {left} of the {before} experts of {layers} left, and the router reduced with them."
    match facts.layout:
        case Layout.REDUCED:
            return f"{base} with the {before} experts of {layers} merged into {left}, and the router reduced with them."
        case Layout.MAPPED:
            return f"{base} with the {before} experts of {layers} merged into {left}, behind a router of {before} rows."
        case Layout.FULL:
            return (
                f"{base} with the {before} experts of {layers} merged into {left} and written {before} times, one copy "
                "for each expert that was merged."
            )


def _how(facts: Facts) -> Iterator[str]:
    method, experts = facts.method, facts.report["experts"]
    links = " and ".join(paper.link for paper in papers(facts))
    cited = f" ({links})" if links else ""
    if facts.changed and facts.is_pruned:
        chosen = words_of(SALIENCIES, method["saliency"], "saliency")
        yield f"Kept are the experts that {chosen}{cited}."
    elif facts.changed:
        yield f"Experts were grouped {grouping(method)}; each group became {merging(method)}{cited}."
        if budget := words_of(BUDGETS, method.get("budget"), "budget"):
            yield budget
    if facts.refits:
        yield _refit(facts)
    if experts["per_token_before"] != experts["per_token_after"]:
        yield f"A token visits {experts['per_token_after']} experts instead of {experts['per_token_before']}."


def _refit(facts: Facts) -> str:
    """What was fitted, and where."""
    kept, choice = facts.refits, facts.method["refit"]
    # The first round of least squares is that of the down projections alone.
    if choice == Refit.EXPERTS and all(refit["rounds"] <= 1 for refit in kept):
        choice = Refit.DOWN
    where = "" if len(kept) == len(facts.changed) else f" in {len(kept)} of {plural(len(facts.changed), 'layer')}"
    return words_of(REFITS, choice, "refit").format(where=where)


def before_after(facts: Facts) -> str:
    """Source and result side by side."""
    report = facts.report
    experts, weights = report["experts"], report["weights_bytes"]
    left = experts_left(facts)
    is_tied = facts.layout is not Layout.REDUCED
    stored = f"{facts.experts_before}, {left} of them distinct" if facts.layout is Layout.FULL else left
    rows = [("Experts per MoE layer", str(facts.experts_before), stored)]
    if is_tied:
        rows.append(("Router rows per MoE layer", str(facts.experts_before), str(facts.experts_before)))
    rows += [
        ("Experts per token", str(experts["per_token_before"]), str(experts["per_token_after"])),
        ("Parameters", *_counts(report["parameters"])),
        ("Parameters that a token passes", *_counts(report["active_parameters"])),
        ("Weights on disk", format_bytes(weights["before"]), with_change(format_bytes(weights["after"]), weights)),
    ]
    return table(("", "base", "this model"), rows)


def _counts(change: Document) -> tuple[str, str]:
    """A number of parameters before and after."""
    return format_count(change["before"]), with_change(format_count(change["after"]), change)
