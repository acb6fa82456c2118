"""What a person sees of a recovery, planned or finished; drawn from the documents that ``--json`` prints."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hcsmoe_hub.cli.tables import Document, section
from hcsmoe_hub.machine.units import (
    format_bytes,
    format_count,
    format_list,
    format_percent,
    format_plural,
    format_seconds,
)
from hcsmoe_hub.options import Device

# What sources and targets were made of, for models with an encoder.
SIDES = {"pairs": "pairs of ", "spans": "spans cut out of "}
# What ended a training, in words.
ENDS = {"steps": "the steps were over", "time": "the time was over", "patience": "nothing improved any more"}


def dry_run(document: Document) -> RenderableType:
    """A recovery that has not begun.

    Args:
        document: The preview as ``--json`` prints it.
    """
    text = document["text"]
    rows = [
        ("teacher", document["teacher"]),
        ("trained", _trained(document)),
        ("text", f"{text['dataset']}, up to {text['sequences']} x {_length(text)} tokens"),
        ("held out", f"{format_percent(text['held_out'])} of it, in whole documents"),
        ("steps", f"{_steps(document)}, {document['step_tokens']} tokens each"),
        ("output", document["output"]),
        ("disk", _disk(document["disk"])),
    ]
    if document["teacher_logits"] is not None:
        size = format_bytes(document["disk"]["logits"])
        rows.insert(1, ("logits", f"up to {size} in {document['teacher_logits']}"))
    return Group(
        Text(document["result"], style="bold"),
        Text(),
        section(rows),
        Text(),
        Text("memory", style="bold"),
        _memory(document),
        Text(),
        Text("No weights were read, and nothing was written."),
    )


def _disk(disk: Document) -> str:
    download = [f"download {format_bytes(disk['download'])}"] if disk["download"] else []
    parts = [f"result {format_bytes(disk['result'])}", f"states of the training up to {format_bytes(disk['states'])}"]
    return format_list([*download, *parts])


def _length(text: Document) -> str:
    """Tokens of a sequence; those of an encoder apart, where the split is known before the text is read."""
    length, source = text["sequence_length"], text["source_length"]
    return f"{source} + {length - source}" if source and (text["is_split"] or text["is_token_ids"]) else f"{length}"


def _trained(document: Document) -> str:
    counts = document["trained"]
    parts = [f"{name} {format_count(count)}" for name, count in counts.items()]
    share = format_percent(sum(counts.values()) / document["parameters"])
    return f"{format_list(parts)} of {format_count(document['parameters'])} parameters ({share})"


def _steps(document: Document) -> str:
    steps, minutes = document["steps"], document["max_minutes"]
    limits = [] if steps is None else [f"up to {steps}"]
    return " and ".join(limits + ([] if minutes is None else [f"as many as fit {minutes:g} min"]))


def _memory(document: Document) -> Table:
    memory, held = document["memory"], document["teacher_logits"] is not None
    rows = [
        ("weights", memory["weights"], f"in {document['dtype']}, what is trained in float32"),
        ("gradients", memory["gradients"], "in float32"),
        ("optimizer", memory["optimizer"], "both moments of Adam"),
        ("teacher", memory["teacher"], "not in memory: its logits are read from the disk" if held else ""),
        ("logits", memory["logits"], "of a batch"),
        ("total", memory["total"], f"on {_where(document)}, and what the layers compute"),
    ]
    return section([(name, format_bytes(size), note) for name, size, note in rows], indent=2)


def _where(document: Document) -> str:
    return "this machine" if document["device"] == Device.CPU else f"each process's {document['device']}"


def recovery(document: Document, *, check_mark: str, seconds: float) -> RenderableType:
    """A finished recovery.

    Args:
        document: As ``--json`` prints it.
        check_mark: Sign of success.
        seconds: Time that everything took.
    """
    record = document["recovery"]
    title = "Recovered" if document["is_better"] else "Training brought nothing, so the result was written as it was"
    return Group(
        Text.assemble((check_mark, "bold green"), (f" {title}", "bold"), f" in {format_seconds(seconds)}"),
        Text(f"  path: {document['output']}", no_wrap=True, overflow="ignore"),
        Text(),
        _scores(record),
        Text(),
        section(_facts(record)),
    )


def training(record: Document) -> list[tuple[str, str]]:
    """The training of a result, for an overview of it."""
    settings, before, after = record["settings"], record["before"], record["after"]
    what = f"{'+'.join(settings['train'])} on {record['data']['dataset']}, {format_plural(record['steps'], 'step')}"
    if not record["kept_step"]:
        return [("trained", f"{what}, which brought nothing")]
    scores = f"held-out perplexity {before['perplexity']:.3f} -> {after['perplexity']:.3f}"
    return [("trained", f"{what}, {record['kept_step']} of them kept; {scores}")]


def _scores(record: Document) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("ON HELD-OUT TEXT", "BEFORE", "AFTER"):
        table.add_column(title, justify="left" if title.startswith("ON") else "right")
    table.add_column(justify="right")
    before, after = record["before"], record["after"]
    change = format_percent(after["perplexity"] / before["perplexity"] - 1)
    table.add_row("perplexity", f"{before['perplexity']:.3f}", f"{after['perplexity']:.3f}", change)
    table.add_row("KL from the teacher, nats", f"{before['kl']:.4f}", f"{after['kl']:.4f}")
    return table


def _facts(record: Document) -> list[tuple[str, str]]:
    data, settings = record["data"], record["settings"]
    source = f"{SIDES.get(data.get('sides', ''), '')}{data['dataset']}"
    trained = f"{'+'.join(settings['train'])}, {format_count(record['trained_parameters'])} parameters"
    steps = f"{format_plural(record['steps'], 'step')} in {format_seconds(record['seconds'])}"
    kept = f"the state after step {record['kept_step']} was kept" if record["kept_step"] else "none was kept"
    return [
        ("teacher", record["teacher"]["repo_id"] or record["teacher"]["path"] or ""),
        ("trained", trained),
        ("text", f"{source}, {format_count(record['tokens'])} tokens seen of {format_count(data['tokens'])}"),
        ("steps", f"{steps}, then {ENDS.get(record['stopped'], record['stopped'])}; {kept}"),
    ]
