"""What was measured of a result, beside what was measured of the model that it was made from."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from hcsmoe_hub.model_cards.command import evaluate_command
from hcsmoe_hub.model_cards.facts import Base, Document, Facts, name_of
from hcsmoe_hub.model_cards.markdown import fence, joined, percent, table, with_error

BASE, THIS, NOTHING, OVERALL = "base", "this model", "-", "all"
UNMEASURED = "Not measured. Nothing here says how much quality was lost: measure it on text and tasks of your own."
# Metrics of lm-eval that are shares of questions answered right.
SHARES = frozenset({"acc", "acc_norm", "average"})
Row = Mapping[str, Any]


def quality(facts: Facts) -> str:
    """The section on quality."""
    command = fence("bash", evaluate_command(facts))
    if not facts.measures:
        return "\n\n".join(("## Quality", UNMEASURED, command))
    blocks = [block for name, block in _BLOCKS.items() if name in facts.measures]
    parts = [part for block in blocks for part in block(facts)]
    return "\n\n".join(("## Quality", *parts, f"{_circumstances(facts)} Measured by:", command))


def base_title(measure: Document, base: Base) -> str:
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


def _rows(measure: Document) -> Iterator[tuple[str, Row, Row | None]]:
    """Domain, figures of the model and of its base: the domains first, then everything."""
    model, base = measure["model"], measure.get("base")
    for domain, row in model["domains"].items():
        yield domain, row, base["domains"].get(domain) if base else None
    yield OVERALL, model["overall"], base["overall"] if base else None


def _perplexity(facts: Facts) -> Iterator[str]:
    measure = facts.measures["perplexity"]
    yield f"Perplexity per token on `{measure['file']['name']}`, windows of {measure['settings']['window']} tokens:"
    rows = []
    for domain, row, base in _rows(measure):
        theirs = (NOTHING, NOTHING)
        if base is not None:
            theirs = (f"{base['perplexity']:.3f}", f"{row['perplexity'] / base['perplexity']:.3f}")
        rows.append((domain, f"{row['tokens']:,}", theirs[0], f"{row['perplexity']:.3f}", theirs[1]))
    yield _table(measure, ("domain", "tokens", base_title(measure, facts.base), THIS, "ratio"), rows, own=3)


def _agreement(facts: Facts) -> Iterator[str]:
    measure = facts.measures["agreement"]
    row, title = measure["model"]["overall"], base_title(measure, facts.base)
    name = "the base model" if title == BASE else title
    yield (
        f"On `{measure['file']['name']}`, this model and {name} name the same most likely token at "
        f"{percent(row['top1_agreement'])} of {row['tokens']:,} positions; mean Kullback-Leibler divergence from "
        f"{name}: {row['kl']:.4f} nats."
    )


def _choices(facts: Facts) -> Iterator[str]:
    measure = facts.measures["choices"]
    yield f"Multiple choice on `{measure['file']['name']}`, accuracy with its standard error:"
    rows = []
    for domain, row, base in _rows(measure):
        theirs = NOTHING if base is None else with_error(base["accuracy"], base["accuracy_stderr"])
        rows.append((domain, f"{row['items']:,}", theirs, with_error(row["accuracy"], row["accuracy_stderr"])))
    yield _table(measure, ("domain", "items", base_title(measure, facts.base), THIS), rows, own=3)


def _loops(facts: Facts) -> Iterator[str]:
    measure = facts.measures["loops"]
    row, settings = measure["model"]["overall"], measure["settings"]
    base = measure["base"]["overall"] if measure.get("base") else None
    sentence = (
        f"Of {row['prompts']} greedy continuations by {settings['continuation_tokens']} tokens, "
        f"{with_error(row['loop_rate'], row['loop_rate_stderr'])} end in a loop"
    )
    if base is None:
        yield f"{sentence}."
    else:
        theirs = with_error(base["loop_rate"], base["loop_rate_stderr"])
        yield f"{sentence} ({base_title(measure, facts.base)}: {theirs})."


def _tasks(facts: Facts) -> Iterator[str]:
    measure = facts.measures["tasks"]
    yield f"Tasks of lm-eval {measure['versions']['lm_eval']}, scored by log-likelihood, with standard errors:"
    model, base = measure["model"], measure.get("base")
    rows = []
    for task, row in model["tasks"].items():
        theirs = base["tasks"].get(task) if base else None
        for metric in (name for name in row if not name.endswith("_stderr") and row[name] is not None):
            rows.append((task, metric, *_metrics(row, theirs, metric)))
    if model["average"] is not None:
        average = {"average": model["average"]}
        rows.append(("mean", "acc", *_metrics(average, base, "average")))
    yield _table(measure, ("task", "metric", base_title(measure, facts.base), THIS, "recovered"), rows, own=3)


def _metrics(row: Row, base: Row | None, metric: str) -> tuple[str, str, str]:
    """A metric of the base, of the model, and of an accuracy the second as a share of the first."""
    shown = _metric(row, metric)
    theirs = base.get(metric) if base else None
    if base is None or theirs is None:
        return NOTHING, shown, NOTHING
    is_share = metric in SHARES and theirs > 0
    return _metric(base, metric), shown, percent(row[metric] / theirs) if is_share else NOTHING


def _metric(row: Row, metric: str) -> str:
    """An accuracy in percent, anything else as it is; with the standard error, if there is one."""
    value, error = row[metric], row.get(f"{metric}_stderr")
    if metric in SHARES:
        return with_error(value, error)
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def _table(measure: Document, titles: Sequence[str], rows: Sequence[Sequence[str]], *, own: int) -> str:
    """A table; without a base, its columns are left out.

    Args:
        measure: What it shows.
        titles: Titles of the columns, the base's before the model's own.
        rows: The cells.
        own: Column of the model's own figures.
    """
    if measure.get("base"):
        return table(titles, rows)
    kept = [number for number in range(len(titles)) if number not in (own - 1, own + 1)]
    return table([titles[number] for number in kept], [[row[number] for number in kept] for row in rows])


def _circumstances(facts: Facts) -> str:
    """In which precision, where, and on which files."""
    measures = facts.measures.values()
    settings = {f"{measure['settings']['dtype']} on {measure['settings']['device']}": None for measure in measures}
    files = {measure["file"]["name"]: measure["file"]["sha256"] for measure in measures if "file" in measure}
    named = [f"`{name}` has the SHA-256 `{digest[:16]}`" for name, digest in files.items()]
    return ". ".join([f"Computed in {joined(list(settings))}", *named]) + "."


_BLOCKS: Mapping[str, Callable[[Facts], Iterator[str]]] = {
    "perplexity": _perplexity,
    "agreement": _agreement,
    "choices": _choices,
    "loops": _loops,
    "tasks": _tasks,
}
