"""What a person sees of a plan and of a finished conversion; drawn from the documents that ``--json`` prints."""

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hcsmoe_hub.checkpoint.auto_class import loading
from hcsmoe_hub.cli.tables import Document, before_after, candidates, experts_left, is_open, section, source_line
from hcsmoe_hub.machine.units import (
    format_bytes,
    format_count,
    format_list,
    format_mean,
    format_percent,
    format_plural,
    format_range,
    format_seconds,
)
from hcsmoe_hub.options import Layout
from hcsmoe_hub.recipe.read import read_recipe
from hcsmoe_hub.recipe.words import method_line

# What a report calls the policy of a router that keeps all its rows.
UNCHANGED = "unchanged"
# Columns that are left for the ratios of single domains in a line of 100.
DOMAINS_WIDTH = 70
TWO_PASSES = (
    "two: the number of experts per layer depends on statistics, so the weights are read again after the model has run"
)
CHOOSING = "two: one pass over the model predicts what each of the shapes below loses, then the best one is converted"


def calibration_line(calibration: Document) -> str:
    """The calibration set in words."""
    length, source = calibration["sequence_length"], calibration.get("source_length")
    each = f"{length} tokens" if source is None else f"{source} + {length - source} tokens"
    size = f"{calibration['sequences']} x {each}"
    return f"{calibration['dataset']}, {size}, seed {calibration['seed']}"


def _needs(needs: Document, room: Document) -> Table:
    download, seconds = needs["download_bytes"], needs["seconds"]
    rows = [
        ("download", format_bytes(download) if download else "nothing", ""),
        *_cache(needs, room),
        ("disk", format_bytes(needs["disk_bytes"]), f"{format_bytes(room['disk_bytes'])} free on {room['disk']}"),
        ("memory", format_bytes(needs["memory_bytes"]), f"{format_bytes(room['memory_bytes'])} available"),
    ]
    if needs.get("checkpoint_bytes"):
        rows.insert(-1, ("", format_bytes(needs["checkpoint_bytes"]), "more meanwhile, to go on after an interruption"))
    if needs["device_bytes"]:
        device = f"{format_bytes(room['device_bytes'])} free on {room['device']}"
        rows.append(("device", format_bytes(needs["device_bytes"]), device))
    if seconds is not None:
        time = "seconds" if seconds < 10 else f"about {format_seconds(seconds)}"
        rows.append(("time", time, "without the download" if download else ""))
    return section(rows, indent=2)


def _cache(needs: Document, room: Document) -> list[tuple[str, str, str]]:
    """The space that the download needs at a time, if there is one."""
    if not needs["cache_bytes"]:
        return []
    place = f"{format_bytes(room['cache_bytes'])} free on {room['cache']}"
    part = ", part of the download at a time" if needs["cache_bytes"] < needs["download_bytes"] else ""
    return [("cache", format_bytes(needs["cache_bytes"]), place + part)]


def dry_run(document: Document, room: Document) -> RenderableType:
    """A plan.

    Args:
        document: The plan as ``--json`` prints it.
        room: What this machine has: ``disk_bytes`` on ``disk``, ``cache_bytes`` on ``cache``, ``memory_bytes``,
            ``device_bytes`` on ``device``.
    """
    rows = [
        ("method", method_line(read_recipe(document["method"]))),
        *_choices(document["like"]),
        ("calibration", calibration_line(document["calibration"])),
    ]
    if document["statistics"] is not None:
        rows.append(("statistics", _statistics(document["statistics"])))
    if "compression" in document:
        compression = document["compression"]
        rows.append(("compression", f"rank {compression['rank']} {expert_work(compression)}"))
    rows.append(("output", document["output"]))
    if document["push_to"] is not None:
        rows.append(("push to", document["push_to"]))
    rows += _formats(document["quantises"])
    rows += [("dropped", reason) for reason in _dropped(document["dropped_tensors"])]
    is_choosing = is_open(document)
    if is_choosing or not document["is_final"]:
        rows.append(("passes", CHOOSING if is_choosing else TWO_PASSES))
    return Group(
        source_line(document["source"], moe_layers=document["experts"]["moe_layers"]),
        Text(),
        before_after(document),
        Text(),
        Text("needs", style="bold"),
        _needs(document["needs"], room),
        Text(),
        section(rows),
        Text(),
        *_target(document),
        Text("Nothing was downloaded or written."),
    )


def _choices(like: Document | None) -> list[tuple[str, str]]:
    """Whose choices are applied, if they are not made here."""
    if like is None:
        return []
    return [("choices", f"experts {'and neurons ' if like['neurons'] else ''}of {like['label']}")]


# Those whose tiles are 128 neurons wide.
KERNELS = "vLLM's bf16 kernels for Blackwell GPUs"


def _formats(quantises: Document | None) -> list[tuple[str, str]]:
    """What the shape of a result can be quantised to, what it cannot, and how it is cut for several GPUs."""
    if quantises is None:
        return []
    rows = [("quantises to", ", ".join(quantises["to"]) or "none of the common formats")]
    if quantises["not_to"]:
        excluded = [f"{name} ({reason.partition(';')[0]})" for name, reason in quantises["not_to"].items()]
        rows.append(("not to", ", ".join(excluded)))
    sizes, whole = (quantises["tensor_parallel"][key] for key in ("divides", "whole_tiles"))
    if cut := [size for size in sizes if size not in whole]:
        parts = "one part" if cut == [1] else f"{format_list(list(map(str, cut)), 'or')} parts"
        rows.append(("serving", f"{parts} of an expert, not of 128 neurons or a multiple each, do not suit {KERNELS}"))
    return rows


def _statistics(statistics: Document) -> str:
    """The statistics file of a plan in words."""
    size = format_bytes(statistics["bytes"])
    if not statistics["reused"]:
        return f"{statistics['path']}, will be written ({size})"
    runs = {
        "source": "the source runs again on its text",
        "result": "only the reduced model runs",
        None: "so the model does not run",
    }
    return f"{statistics['path']} ({size}), reused, {runs[statistics['runs']]}"


def _target(document: Document) -> list[RenderableType]:
    """What meets a target, if there is one."""
    target = document.get("target")
    if target is None:
        return []
    return [Text(f"meet {target_words(target)}", style="bold"), candidates(target), Text()]


def target_words(target: Document) -> str:
    """A target as it was typed: ``--size 24.0 GB``."""
    value = target["value"]
    shown = {"size": format_bytes, "ratio": lambda share: f"{share:g}"}.get(target["limit"], format_count)
    return f"--{target['limit']} {shown(value if target['limit'] == 'ratio' else int(value))}"


def _dropped(dropped: Mapping[str, str]) -> list[str]:
    """One line per reason."""
    return [f"{format_plural(count, 'tensor')}: {reason}" for reason, count in Counter(dropped.values()).items()]


def conversion(document: Document, *, check_mark: str, seconds: float) -> RenderableType:
    """A finished conversion, from its report, and how long it took."""
    layers, layout = document["layers"], document["method"]["layout"]
    distinct = "distinct experts" if layout == Layout.FULL else "experts"
    title = f"Converted to {format_range(experts_left(document))} {distinct} per layer"
    if "width_after" in document["experts"]:
        title += f" of {document['experts']['width_after']} neurons"
    facts = [] if document["output"] is None else [("path", document["output"])]
    if "pushed" in document:
        facts.append(("pushed", document["pushed"]["pull_request"] or document["pushed"]["url"]))
    if "figure" in document:
        facts.append(("figure", document["figure"]))
    if "singular_values" in document:
        facts.append(("singular values", document["singular_values"]))
    if layout in (Layout.MAPPED, Layout.FACTORED):
        place, kind = document["output"] or document["pushed"]["repo_id"], document["source"]["model_type"]
        facts.append(("load", loading(place, kind, runs_code=True)))
    return Group(
        Text.assemble((check_mark, "bold green"), (f" {title}", "bold"), f" in {format_seconds(seconds)}"),
        *(Text(f"  {label}: {text}", no_wrap=True, overflow="ignore") for label, text in facts),
        Text(),
        before_after(document),
        Text(),
        *_target(document),
        section([*cost(document["measured"]), *_measures(layers), *_compressed(document)]),
        Text(_circumstances(document), style="dim"),
    )


def _compressed(document: Document) -> list[tuple[str, str, str]]:
    """What the expert matrices became, if they did not stay whole."""
    compression = document.get("compression")
    if compression is None:
        return []
    before, after = (
        fmean(rank for layer in document["layers"] for ranks in layer["stable_rank"][when].values() for rank in ranks)
        for when in ("before", "after")
    )
    return [
        ("expert matrices", f"rank {compression['rank']}", expert_work(compression)),
        ("stable rank", f"{before:.1f} -> {after:.1f}", "of expert matrices, before and after the merge"),
    ]


def expert_work(compression: Document) -> str:
    """The rows of compressed matrices that stay whole, and what a token costs."""
    flops = compression["expert_flops_per_token"]
    rows = f"and {compression['incoming_rows']} rows of gate and up, {compression['outgoing_rows']} of down; "
    work = f"{format_count(flops['before'])} -> {format_count(flops['after'])} operations of experts per token"
    return (rows if compression["incoming_rows"] else "") + work


def cost(measured: Document | None) -> list[tuple[str, str, str]]:
    """What a conversion cost on held-out text; empty if that was not measured."""
    if measured is None:
        return []
    overall = measured["overall"]
    return [
        ("perplexity", f"x{overall['ratio']:.2f}", _domains(measured)),
        (
            "same top token",
            format_percent(overall["top1_agreement"]),
            f"of the time; KL divergence from the source {overall['kl']:.3g} nats",
        ),
    ]


def _domains(measured: Document) -> str:
    """How much text was held out, and the ratio of each of its domains, the worst first, as far as a line goes."""
    words = f"on {measured['overall']['tokens']:,} held-out tokens"
    rows = sorted(measured["domains"].items(), key=lambda item: -item[1]["ratio"])
    if len(rows) < 2:
        return words
    named = [f"{domain} {row['ratio']:.2f}" for domain, row in rows]
    for shown in range(len(named), 0, -1):
        rest = [] if shown == len(named) else [f"{len(named) - shown} more"]
        line = f"{words}: {', '.join([*named[:shown], *rest])}"
        if len(line) <= DOMAINS_WIDTH:
            break
    return line


def _circumstances(document: Document) -> str:
    """What the figures of a summary were measured on."""
    layers = f"over {format_plural(len(document['layers']), 'MoE layer')} on calibration text"
    if document["measured"] is not None:
        return f"Held-out text of the calibration set, and averages {layers}. See also `hcsmoe evaluate`."
    reason = "" if document["not_measured"] is None else f": {document['not_measured']}"
    return f"Averages {layers}. Perplexity was not measured{reason}. Run `hcsmoe evaluate`."


def _fit(layers: Sequence[Document]) -> list[tuple[str, str, str]]:
    """What a fit of the router brought, if one was asked for."""
    routers = [layer["router"] for layer in layers if layer["router"]["is_fitted"] is not None]
    kept = [router for router in routers if router["is_fitted"]]
    if not routers:
        return []
    if not kept:
        meaning = "layers, as the fit was worse on held-out text, or there was nothing to fit"
    else:
        before, after = (fmean(router[key] for router in kept) for key in ("top_k_agreement_before", "top_k_agreement"))
        meaning = f"layers, top-k agreement {format_percent(before)} -> {format_percent(after)}"
    return [("router fit", f"{len(kept)}/{len(routers)}", meaning)]


def _refit(refits: Sequence[Document]) -> list[tuple[str, str, str]]:
    """What a refit brought, if one was asked for."""
    kept = [refit for refit in refits if refit["is_kept"]]
    if not refits:
        return []
    meaning = "layers, as held-out error fell in none"
    if kept:
        before, after = (fmean(refit[key] for refit in kept) for key in ("error_before", "error_after"))
        work = effort([refit["rounds"] for refit in kept], [refit["steps"] for refit in kept])
        meaning = f"layers, held-out error {format_percent(before)} -> {format_percent(after)} ({work})"
    return [("refit", f"{len(kept)}/{len(refits)}", meaning)]


def effort(rounds: list[int], steps: list[int]) -> str:
    """The work of the refits that were kept, a number per layer each, in words."""
    counts = ((rounds, "round"), (steps, "step"))
    return " and ".join(
        f"{format_range(numbers)} {what}{'s' if max(numbers) != 1 else ''}" for numbers, what in counts if any(numbers)
    )


def _measures(layers: Sequence[Document]) -> list[tuple[str, str, str]]:
    """What was measured of the layers, where it is defined."""
    if all(layer["router"]["policy"] == UNCHANGED for layer in layers):
        rows = [("router", "unchanged", "tokens are routed as in the source")]
    else:
        agreement = fmean(layer["router"]["top_k_agreement"] for layer in layers)
        meaning = "of the original router's choices are kept"
        rows = [("top-k agreement", format_percent(agreement), meaning), *_fit(layers)]
    error = fmean(layer["output_error"] for layer in layers)
    rows.append(("output error", format_percent(error), "of the norm of the routed experts' output"))
    rows += _refit([layer["refit"] for layer in layers if layer["refit"] is not None])
    for label, key, meaning in (
        ("silhouette", "silhouette", "-1 to 1: how much closer experts are to their own cluster than to the next one"),
        ("Dunn index", "dunn", "smallest distance between clusters over the largest within one"),
    ):
        if any(layer[key] is not None for layer in layers):
            rows.append((label, format_mean(layer[key] for layer in layers), meaning))
    dead, experts = (sum(len(layer[key]) for layer in layers) for key in ("dead_experts", "labels"))
    if dead:
        rows.append(("dead experts", f"{dead} of {experts}", "were routed no calibration token"))
    return rows
