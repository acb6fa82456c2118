"""Markdown tables of what ``quality.py`` measured."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from quality_recipes import ABSENT, RECIPES
from quality_rows import Measured, best_baseline, calibrations, cases, measured, share_left, source_key
from quality_statistics import Change, Ratio, change
from quality_store import Store

# What the default and the best setting may leave of the best baseline's excess, and what the default may cost.
TARGETS: Mapping[str, float] = {"default": 0.3, "best": 0.2}
CPU_TARGET = 2.5


def main_table(rows: Sequence[Measured]) -> str:
    """All recipes on one model."""
    names = ["recipe", "perplexity ratio", "of the excess", "worst domain", "choices", "to the source", "to the best"]
    names += ["top-1 agreement", "output error", "loops", "CPU s", "times HC-SMoE"]
    best, (store, source) = best_baseline(rows), (rows[0].store, rows[0].source)
    of_source = store.rows[source]
    cells = [["the source", "1", "", "", percent(of_source["accuracy"]), "", "", "100.0 %", "", *["", "", ""]]]
    cells[0][9] = percent(of_source["loop_rate"])
    domains = sorted(set(store.array(source, "domains").tolist()))
    for row in rows:
        seeds = f", ±{row.spread:.4f} by seed" if len(row.keys) > 1 else ""
        worst = max(domains, key=lambda domain: row.ratio(domain).ratio)
        compared = change(row.right, best.right) if best is not None and best is not row else None
        is_judged = best is not None and RECIPES[row.recipe].group != "baseline"
        cells.append(
            [
                row.title,
                interval(row.overall) + seeds,
                f"{share_left(row, best):.2f}" if best is not None and is_judged else "",
                f"{worst} {row.ratio(worst).ratio:.3f}" if worst else "",
                percent(row.mean("accuracy")),
                points(change(row.right, store.array(source, "right"))) if len(row.right) > 1 else "",
                points(compared) if compared is not None and len(row.right) > 1 else "",
                percent(row.mean("top_1_agreement")),
                percent(row.mean("output_error")),
                percent(row.mean("loop_rate")),
                number(row.mean("cpu_seconds"), 1),
                number(row.times_reference(), 2),
            ]
        )
    return table(names, cells)


def domain_table(rows: Sequence[Measured], recipes: Iterable[str]) -> str:
    """Ratios by domain."""
    domains = sorted(set(rows[0].store.array(rows[0].source, "domains").tolist()))
    chosen = [row for row in rows if row.recipe in set(recipes)]
    return table(
        ["recipe", *domains], [[row.title, *(interval(row.ratio(domain)) for domain in domains)] for row in chosen]
    )


def absent_table(store: Store, model: str, experts: int, calibration: str) -> str:
    """Ratios on each domain after calibration on the others."""
    domains = sorted({key.absent for key in store.rows if key.model == model} - {""})
    cells = []
    for recipe in ABSENT:
        found = {
            row.keys[0].absent: row
            for domain in domains
            for row in measured(store, model, experts, calibration, domain)
            if row.recipe == recipe
        }
        if found:
            ratios = [interval(found[domain].overall) if domain in found else "" for domain in domains]
            cells.append([RECIPES[recipe].title, *ratios])
    return table(["recipe", *(f"without {domain}" for domain in domains)], cells) if domains and cells else ""


def calibration_table(store: Store, model: str, experts: int) -> str:
    """Ratios by the text that was calibrated on."""
    domains = sorted(set(store.array(source_key(store, model), "domains").tolist()))
    cells = [
        [calibration, row.title, interval(row.overall), *(f"{row.ratio(domain).ratio:.3f}" for domain in domains)]
        for calibration in calibrations(store, model)
        for row in measured(store, model, experts, calibration)
    ]
    return table(["calibration text", "recipe", "perplexity ratio", *domains], cells)


def target_table(store: Store) -> str:
    """What the default and the best setting leave and cost, in every case."""
    names = ["case", "best baseline", *(f"{RECIPES[name].title} leaves" for name in TARGETS)]
    names += ["times HC-SMoE", "choices, to the baseline best at them"]
    cells = []
    for model, experts, calibration in cases(store):
        rows = measured(store, model, experts, calibration)
        best, by_name = best_baseline(rows), {row.recipe: row for row in rows}
        if best is None or "default" not in by_name:
            continue
        before, default = source_key(store, model).experts, by_name["default"]
        shares = [
            f"{share_left(by_name[name], best):.2f} (at most {most})" if name in by_name else ""
            for name, most in TARGETS.items()
        ]
        times = default.times_reference()
        cost = f"{times:.2f} (at most {CPU_TARGET})" if times is not None else ""
        surest = max((row for row in rows if RECIPES[row.recipe].group == "baseline"), key=lambda row: row.right.mean())
        answers = f"{points(change(default.right, surest.right))} to {surest.title}" if len(default.right) > 1 else ""
        case = f"{model}, {before} to {experts}"
        cells.append([case, f"{best.title} {best.overall.ratio:.3f}", *shares, cost, answers])
    return table(names, cells) if cells else ""


def document(stores: Sequence[Store]) -> Iterator[str]:
    """The section of the README: targets, then every model."""
    for store in stores:
        if text := target_table(store):
            yield text
    for store in stores:
        for model, experts, calibration in cases(store):
            yield f"#### {model}, {source_key(store, model).experts} to {experts} experts"
            rows = measured(store, model, experts, calibration)
            if rows:
                yield main_table(rows)
                best = best_baseline(rows)
                shown = ["hc-smoe-full", "reap", "down", "default", "best", *([best.recipe] if best else [])]
                yield f"By domain:\n\n{domain_table(rows, shown)}"
            if absent := absent_table(store, model, experts, calibration):
                yield f"On a domain that is absent from calibration:\n\n{absent}"
            if len(calibrations(store, model)) > 1:
                yield f"By calibration text:\n\n{calibration_table(store, model, experts)}"
            yield from refusals(store, model, experts)


def refusals(store: Store, model: str, experts: int) -> Iterator[str]:
    """Why recipes are missing."""
    for key, figures in store.rows.items():
        if (key.model, key.experts) == (model, experts) and "refused" in figures:
            yield f"{RECIPES[key.recipe].title} was refused: {figures['refused']}"


def table(names: Sequence[str], cells: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(row)} |" for row in (names, *cells)]
    return "\n".join([lines[0], f"|{'---|' * len(names)}", *lines[1:]])


def interval(found: Ratio) -> str:
    """A ratio and its interval."""
    return f"{found.ratio:.3f} ({found.low:.3f} to {found.high:.3f})"


def percent(value: float | None) -> str:
    """A share in percent."""
    return "" if value is None else f"{100 * value:.1f} %"


def points(found: Change) -> str:
    """A difference of accuracies in points, with its standard error."""
    return f"{100 * found.change:+.1f} ±{100 * found.error:.1f}"


def number(value: float | None, digits: int) -> str:
    """A number, or nothing."""
    return "" if value is None else f"{value:.{digits}f}"
