"""The cost table as people read it, in a terminal and in a card."""

from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

from hcsmoe_hub.evaluation.cost_options import SWITCHED_OFF
from hcsmoe_hub.evaluation.measures import Cost, CostFigures, Spread
from hcsmoe_hub.machine.units import format_bytes, format_count, format_list, format_plural

Value = TypeVar("Value")

NOTHING = "-"
# The order in which two models ran, in words.
_ORDERS = {"in turns": ", both models in turns", "one after another": ", one model after the other"}


class CostRow(NamedTuple):
    """One line of the table.

    Attributes:
        name: What is counted or measured.
        base: Of the base; a dash if there is none, or it was left out.
        model: Of the model.
        ratio: Model divided by base.
    """

    name: str
    base: str
    model: str
    ratio: str


def cost_rows(measure: Cost) -> list[CostRow]:
    """The lines of the table; figures that neither model has are left out."""
    settings = measure["settings"]
    prompt = settings["prompt_tokens"]
    numbers = [
        _numbers(measure, "Parameters", lambda figures: figures["parameters"], format_count),
        _numbers(measure, "Active parameters per token", lambda figures: figures["active_parameters"], format_count),
        _numbers(measure, "Weights on disk", lambda figures: figures["disk_bytes"], format_bytes),
        _numbers(
            measure, f"Weights in memory, {settings['dtype']}", lambda figures: figures["memory_bytes"], format_bytes
        ),
        _numbers(
            measure, f"FLOPs per token, prompt of {prompt}", lambda figures: figures["prefill_flops"], format_count
        ),
        _numbers(
            measure, f"FLOPs per token, after {prompt} tokens", lambda figures: figures["decode_flops"], format_count
        ),
    ]
    return [row for row in (*numbers, *_measured(measure)) if row is not None]


def cost_notes(measure: Cost) -> list[str]:
    """What a reader has to know about the figures, a sentence each; the reasons for missing ones among them."""
    settings = measure["settings"]
    found = [
        "FLOPs are two per multiply-add, of active experts only, with the output head and without element-wise work."
    ]
    sides = [("the model", measure["model"]), ("the base", measure.get("base"))]
    if any(figures is not None and figures["is_attention_masked"] is False for _, figures in sides):
        found.append("Attention counts every pair of positions, also those that the mask excludes.")
    if settings["timing"]:
        found.append(_how_measured(measure))
    for name, figures in sides:
        problems = _problems(figures) if figures is not None else []
        found += [f"{what} of {name}: left out, as {why}." for what, why in problems]
    return found


def _problems(figures: CostFigures) -> list[tuple[str, str]]:
    whole = (
        ("FLOPs", figures["flops_problem"]),
        ("Throughput", figures["throughput_problem"]),
        ("Peak memory", figures["peak_memory_problem"]),
    )
    return [(what, why) for what, why in whole if why is not None and why != SWITCHED_OFF]


def _how_measured(measure: Cost) -> str:
    settings = measure["settings"]
    names = ("vllm",) if settings["engine"] == "vllm" else ("torch", "transformers")
    versions = format_list([f"{name} {measure['versions'][name]}" for name in names])
    found = (
        f"Measured on {settings['machine']} in {settings['dtype']} with {versions}: median (min to max) of "
        f"{format_plural(settings['repetitions'], 'run')} of {settings['prompt_tokens']} prompt tokens and "
        f"{settings['new_tokens']} new ones{_ORDERS.get(settings['order'] or '', '')}."
    )
    memory = measure["model"]["peak_memory"]
    if memory is None:
        return found
    of = "all tensors on the device"
    if settings["device"] == "cpu":
        of = f"a whole process, which held {format_bytes(memory['process'])} before it loaded the model"
    return f"{found} Peak memory is that of {of}, measured in a fresh process for each model."


def _measured(measure: Cost) -> Iterator[CostRow | None]:
    for batch in map(str, measure["settings"]["batch_sizes"]):

        def prefill(figures: CostFigures, batch: str = batch) -> Spread | None:
            throughput = figures["throughput"]
            return None if throughput is None else throughput[batch]["prefill"]["tokens_per_second"]

        def decode(figures: CostFigures, batch: str = batch) -> Spread | None:
            throughput = figures["throughput"]
            return None if throughput is None else throughput[batch]["decode"]["tokens_per_second"]

        def peak(figures: CostFigures, batch: str = batch) -> int | None:
            memory = figures["peak_memory"]
            return None if memory is None else memory["batches"][batch]

        yield _spreads(measure, f"Prefill, batch {batch}, tokens/s", prefill)
        yield _spreads(measure, f"Decode, batch {batch}, tokens/s", decode)
        yield _numbers(measure, f"Peak memory, batch {batch}", peak, format_bytes)


def _numbers(
    measure: Cost, name: str, of: Callable[[CostFigures], int | None], shown: Callable[[int], str]
) -> CostRow | None:
    model, base = _both(measure, of)
    theirs, ours = (NOTHING if number is None else shown(number) for number in (base, model))
    return None if model is None and base is None else CostRow(name, theirs, ours, _ratio(model, base))


def _spreads(measure: Cost, name: str, of: Callable[[CostFigures], Spread | None]) -> CostRow | None:
    model, base = _both(measure, of)
    theirs, ours = (NOTHING if spread is None else _spread(spread) for spread in (base, model))
    medians = [None if spread is None else spread["median"] for spread in (model, base)]
    return None if model is None and base is None else CostRow(name, theirs, ours, _ratio(*medians))


def _both(measure: Cost, of: Callable[[CostFigures], Value]) -> tuple[Value | None, Value | None]:
    base = measure.get("base")
    return of(measure["model"]), None if base is None else of(base)


def _ratio(model: float | None, base: float | None) -> str:
    return NOTHING if model is None or not base else f"{model / base:.3f}"


def _spread(spread: Spread) -> str:
    digits = 0 if spread["min"] >= 100 else 1
    return f"{spread['median']:,.{digits}f} ({spread['min']:,.{digits}f} to {spread['max']:,.{digits}f})"
