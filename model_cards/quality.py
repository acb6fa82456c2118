"""What was measured of a result, compared with the model that it was made from."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from hcsmoe_hub.evaluation.cost_rows import cost_notes, cost_rows
from hcsmoe_hub.evaluation.measures import Agreement, Choices, Cost, LoopRow, Loops, Perplexity, Tasks
from hcsmoe_hub.machine.units import format_list, format_percent
from hcsmoe_hub.model_cards.card_data import Base, CardData, name_of
from hcsmoe_hub.report import Measured

BASE, THIS, NOTHING, OVERALL = "base", "this model", "-", "all"
# Metrics of lm-eval that are shares of questions answered right.
SHARES = frozenset({"acc", "acc_norm", "average"})
Row = Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class Table:
    """A table of figures.

    Attributes:
        titles: Titles of the columns.
        rows: The cells.
    """

    titles: Sequence[str]
    rows: Sequence[Sequence[str]]


def base_title(measure: Perplexity | Agreement | Choices | Loops | Tasks | Cost, base: Base) -> str:
    """What a table calls the model that figures are compared with: ``base`` only if it is the one."""
    named = measure.get("base_model")
    if not named:
        return BASE
    name, revision = name_of(named), named.get("revision")
    both = (named.get("fingerprint"), base.fingerprint)
    # Folders of the same name may hold different models.
    is_base = both[0] == both[1] if all(both) else (name, revision) == (base.name, base.revision)
    if is_base:
        return BASE
    return name if revision is None else f"{name} @ {revision[:7]}"


def perplexity_table(measure: Perplexity, base: Base) -> Table:
    """Perplexity per token by domain, of the base and of the result."""
    model, other = measure["model"], measure.get("base")
    rows = []
    for domain, row in [*model["domains"].items(), (OVERALL, model["overall"])]:
        theirs = None
        if other is not None:
            theirs = other["overall"] if domain == OVERALL else other["domains"].get(domain)
        figures = (NOTHING, f"{row['perplexity']:.3f}", NOTHING)
        if theirs is not None:
            ratio = row["perplexity"] / theirs["perplexity"]
            figures = (f"{theirs['perplexity']:.3f}", figures[1], f"{ratio:.3f}")
        rows.append((domain, f"{row['tokens']:,}", *figures))
    return _table(("domain", "tokens", base_title(measure, base), THIS, "ratio"), rows, has_base=bool(other))


def cost_table(measured: Measured, result: str = THIS) -> Table:
    """What the conversion cost on held-out text, by domain; ``result`` is what its column calls the result."""
    titles = ("domain", "tokens", BASE, result, "ratio", "KL", "same top token")
    named = [*measured["domains"].items()] if len(measured["domains"]) > 1 else []
    rows = [
        (
            domain,
            f"{row['tokens']:,}",
            f"{row['perplexity_before']:.3f}",
            f"{row['perplexity_after']:.3f}",
            f"{row['ratio']:.3f}",
            f"{row['kl']:.4f}",
            format_percent(row["top1_agreement"]),
        )
        for domain, row in [*named, (OVERALL, measured["overall"])]
    ]
    return Table(titles, rows)


def domain_ratios(measured: Measured) -> str:
    """The ratio of each domain, the worst first: ``french 1.37, prose 1.21``."""
    rows = sorted(measured["domains"].items(), key=lambda item: -item[1]["ratio"])
    return ", ".join(f"{domain} {row['ratio']:.2f}" for domain, row in rows)


def choices_table(measure: Choices, base: Base) -> Table:
    """Accuracy by domain, of the base and of the result."""
    model, other = measure["model"], measure.get("base")
    rows = []
    for domain, row in [*model["domains"].items(), (OVERALL, model["overall"])]:
        theirs = None
        if other is not None:
            theirs = other["overall"] if domain == OVERALL else other["domains"].get(domain)
        shown = NOTHING if theirs is None else format_percent(theirs["accuracy"], theirs["accuracy_stderr"])
        rows.append((domain, f"{row['items']:,}", shown, format_percent(row["accuracy"], row["accuracy_stderr"])))
    return _table(("domain", "items", base_title(measure, base), THIS), rows, has_base=bool(other))


def tasks_table(measure: Tasks, base: Base) -> Table:
    """Metrics by task, of the base and of the result, and what is left of an accuracy."""
    model, other = measure["model"], measure.get("base")
    rows = []
    for task, row in model["tasks"].items():
        theirs = other["tasks"].get(task) if other else None
        for metric in (name for name in row if not name.endswith("_stderr") and row[name] is not None):
            rows.append((task, metric, *_metrics(row, theirs, metric)))
    if model["average"] is not None:
        average = {"average": model["average"]}
        rows.append(("mean", "acc", *_metrics(average, {"average": other["average"]} if other else None, "average")))
    return _table(("task", "metric", base_title(measure, base), THIS, "recovered"), rows, has_base=bool(other))


def running_cost_table(measure: Cost, base: Base) -> Table:
    """What it costs to run the base and the result."""
    titles = ("", base_title(measure, base), THIS, "ratio")
    kept = range(len(titles)) if measure.get("base") else (0, 2)
    return Table([titles[number] for number in kept], [[row[number] for number in kept] for row in cost_rows(measure)])


def running_cost_notes(measure: Cost) -> str:
    """What a reader has to know about that table."""
    return " ".join(cost_notes(measure))


def loop_rate(row: LoopRow) -> str:
    """Share of continuations that end in a loop, with its standard error."""
    return format_percent(row["loop_rate"], row["loop_rate_stderr"])


def _metrics(row: Row, base: Row | None, metric: str) -> tuple[str, str, str]:
    """A metric of the base, of the model, and of an accuracy the second as a share of the first."""
    shown, value = _metric(row, metric), row[metric]
    theirs = base.get(metric) if base else None
    if base is None or theirs is None or value is None:
        return NOTHING, shown, NOTHING
    is_share = metric in SHARES and theirs > 0
    return _metric(base, metric), shown, format_percent(value / theirs) if is_share else NOTHING


def _metric(row: Row, metric: str) -> str:
    """An accuracy in percent, anything else as it is; with the standard error, if there is one."""
    value, error = row[metric], row.get(f"{metric}_stderr")
    if value is None:
        return NOTHING
    if metric in SHARES:
        return format_percent(value, error)
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]], *, has_base: bool) -> Table:
    """A table whose third column is the base's and whose fifth, if any, compares; without a base both are left out."""
    kept = [number for number in range(len(titles)) if has_base or number not in (2, 4)]
    return Table([titles[number] for number in kept], [[row[number] for number in kept] for row in rows])


def circumstances(card: CardData) -> str:
    """Precision and device of the measures: ``float32 on cpu``."""
    return format_list(list(dict.fromkeys(_circumstances(card))))


def _circumstances(card: CardData) -> Iterator[str]:
    for name, measure in card.measures.items():
        if name == "cost":
            continue
        # A typed dictionary does not say what kinds of values it holds together.
        settings = measure["settings"]  # type: ignore[index]
        yield f"{settings['dtype']} on {settings['device']}"


def measured_files(card: CardData) -> dict[str, str]:
    """SHA-256 of every text and set of questions by its name."""
    found = {}
    for measure in card.measures.values():
        if "file" in measure:  # type: ignore[operator]
            file = measure["file"]  # type: ignore[index]
            found[file["name"]] = file["sha256"]
    return found
