"""How a result was made: the command, the calibration text, the router, and every layer."""

import re
from collections import Counter
from collections.abc import Iterator
from statistics import fmean

from hcsmoe_hub.machine.units import format_bytes
from hcsmoe_hub.model_cards.command import TOKEN_IDS, convert_command
from hcsmoe_hub.model_cards.facts import Document, Facts, experts_of
from hcsmoe_hub.model_cards.markdown import bullets, fence, folded, percent, plural, span, table
from hcsmoe_hub.model_cards.words import ROUTERS, dominant_words, words_of
from hcsmoe_hub.options import Layout, RouterPolicy
from hcsmoe_hub.report import FIGURE_FILE, REPORT_FILE

DATASETS = {
    "bundled": "the text that hcsmoe brings along (English prose, manuals and code)",
    "c4": "C4, English (`allenai/c4`)",
}
WARNINGS = 10
# What a refit counts.
_WORK = {"rounds": "round{} of least squares", "steps": "step{} of gradient descent"}
_HUB_DATASET = re.compile(r"[\w.-]+/[\w.-]+")


def making(facts: Facts) -> str:
    """The section on how it was made."""
    tool = facts.report["tool"]
    parts = [
        "## How it was made",
        f"With {tool['name']} {tool['version']}:",
        fence("bash", convert_command(facts)),
        bullets(_items(facts)),
    ]
    if FIGURE_FILE in facts.files:
        parts.append(f"![Usage of the experts, distances between them and clusters, layer by layer]({FIGURE_FILE})")
    parts += [folded("Layer by layer", _layers(facts)), *_warnings(facts)]
    return "\n\n".join(parts)


def calibration_text(facts: Facts) -> str:
    """The calibration set, without its size."""
    name = facts.report["calibration"]["dataset"]
    if name.endswith(TOKEN_IDS):
        return f"the token ids in `{name}`"
    if name in DATASETS:
        return DATASETS[name]
    return f"[{name}](https://huggingface.co/datasets/{name})" if _HUB_DATASET.fullmatch(name) else f"`{name}`"


def _calibration(facts: Facts) -> str:
    """What the experts were observed on, and how much of it."""
    record = facts.report["calibration"]
    size = f"{record['sequences']:,} sequences of {record['sequence_length']:,} tokens ({record['tokens']:,} in all)"
    is_shuffled = not record["dataset"].endswith(TOKEN_IDS)
    seed = f", seed {record['seed']}" if is_shuffled else ""
    return f"{size} of {calibration_text(facts)}{seed}"


def _items(facts: Facts) -> Iterator[str]:
    report, method = facts.report, facts.method
    yield f"**Calibration**: {_calibration(facts)}. SHA-256 of the token ids: `{report['calibration']['sha256'][:16]}`."
    if method["seed"] != report["calibration"]["seed"]:
        yield (
            f"**Seeds**: {report['calibration']['seed']} for the text, {method['seed']} for the method; the command "
            "line has one option for both, `MethodOptions` and `CalibrationOptions` have one each."
        )
    yield f"**Router**: {_router(facts)}"
    yield f"**Change of the layers**: {_change(facts)}"
    if tried := sum(layer.get("refit") is not None for layer in facts.layers):
        yield f"**Refit**: {_refit(facts, tried)}"
    if method.get("protect"):
        yield f"**Left alone**: experts `{method['protect']}` (layer:expert)."
    for reason, count in Counter(report["dropped_tensors"].values()).items():
        yield f"**Left out**: {plural(count, 'tensor')}, {reason}."
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    cost = f"{sum(report['timings_seconds'].values()):.0f} s"
    peaks = report["peak_memory_bytes"]
    cost += f", at most {format_bytes(peaks['process'])} of memory" if "process" in peaks else ""
    cost += "".join(f", {format_bytes(peak)} on {device}" for device, peak in peaks.items() if device != "process")
    yield f"**Run**: {cost}; {versions}."
    content = "which experts every layer kept" if facts.is_pruned else "the clusters of every layer"
    yield f"[`{REPORT_FILE}`]({REPORT_FILE}) holds every choice in force and {content}."


def _router(facts: Facts) -> str:
    before = facts.experts_before
    if facts.layout is Layout.MAPPED:
        return f"unchanged, {before} rows; `config.json` maps each to an expert."
    if facts.layout is Layout.FULL:
        return f"unchanged, {before} rows."
    if not facts.changed:
        return "unchanged."
    policy = facts.method.get("router")
    if facts.is_pruned and policy is None:
        rule = "Rows of dropped experts went with them, the others are unchanged."
    else:
        rule = words_of(ROUTERS, policy, "router policy").format(dominant=dominant_words(facts.method))
    if policy == RouterPolicy.FIT:
        rule += _fit(facts)
    agreement = percent(fmean(layer["router"]["top_k_agreement"] for layer in facts.layers))
    return (
        f"{rule} On calibration tokens, {agreement} of the {'experts' if facts.is_pruned else 'clusters'} that the "
        "base model's router chooses are also chosen by this one (mean over layers)."
    )


def _fit(facts: Facts) -> str:
    """How often a fit of the router was kept, and what it changed."""
    tried = [router for layer in facts.layers if (router := layer["router"]).get("top_k_agreement_before") is not None]
    kept = [router for router in tried if router.get("is_fitted")]
    told = ""
    if len(kept) < len(tried):
        told = f" They are in {len(kept)} of {plural(len(tried), 'layer')}; elsewhere held-out text spoke against them."
    if kept:
        before, after = (fmean(router[key] for router in kept) for key in ("top_k_agreement_before", "top_k_agreement"))
        told += f" Where they were fitted, agreement went from {percent(before)} to {percent(after)}."
    return told


def _refit(facts: Facts, tried: int) -> str:
    """In how many layers a refit was kept, after how much work, and what it brought on held-out tokens."""
    kept = facts.refits
    if not kept:
        return f"tried in {plural(tried, 'layer')} and dropped: held-out calibration tokens spoke against it."
    counts = {what: span([entry[key] for entry in kept]) for key, what in _WORK.items()}
    work = [f"{count} {what.format('' if count == '1' else 's')}" for what, count in counts.items() if count != "0"]
    before, after = (percent(fmean(entry[key] for entry in kept)) for key in ("error_before", "error_after"))
    elsewhere = "" if len(kept) == tried else " Elsewhere held-out tokens spoke against it."
    return (
        f"kept in {len(kept)} of {plural(tried, 'layer')}, after {' and '.join(work)}. On calibration tokens that were "
        f"held out of the fit, the error of the routed experts' output fell from {before} to {after} of its norm (mean "
        f"over {plural(len(kept), 'layer')}).{elsewhere}"
    )


def _change(facts: Facts) -> str:
    if not facts.changed:
        return "none."
    error = percent(fmean(layer["output_error"] for layer in facts.changed))
    return (
        "the routed experts' output differs from the base model's on calibration tokens by "
        f"{error} of its norm (mean over {plural(len(facts.changed), 'layer')}). That is no measure of quality."
    )


def _layers(facts: Facts) -> str:
    """Every layer in a row."""
    is_reduced = facts.layout is Layout.REDUCED
    is_refitted = any(layer.get("refit") is not None for layer in facts.layers)
    titles = ["layer", "experts", "dropped" if facts.is_pruned else "largest cluster"]
    titles += ["top-k agreement"] if is_reduced else []
    rows = []
    for layer in facts.layers:
        sizes: Counter[int] = Counter(layer["labels"])
        dropped = sizes.pop(-1, 0)
        row = [str(layer["layer"]), str(experts_of(layer)), str(dropped if facts.is_pruned else max(sizes.values()))]
        row += [percent(layer["router"]["top_k_agreement"])] if is_reduced else []
        row += [percent(layer["output_error"]), str(len(layer["dead_experts"]))]
        rows.append([*row, *([_held_out(layer)] if is_refitted else [])])
    titles += ["output error", "experts no token reached"]
    return table([*titles, *(["held-out error of the fit"] if is_refitted else [])], rows)


def _held_out(layer: Document) -> str:
    """What the refit of a layer did to the error on tokens that it never saw."""
    refit = layer.get("refit")
    if refit is None:
        return "-"
    before, after = percent(refit["error_before"]), percent(refit["error_after"])
    return f"{before} to {after}" if refit["is_kept"] else f"{before}, dropped"


def _warnings(facts: Facts) -> Iterator[str]:
    """What the conversion warned of."""
    warnings = facts.report["warnings"]
    if not warnings:
        return
    shown = list(warnings[:WARNINGS])
    if len(warnings) > WARNINGS:
        shown.append(f"and {len(warnings) - WARNINGS} more in `{REPORT_FILE}`")
    yield folded("What the conversion warned of", bullets(shown))
