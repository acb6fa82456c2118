"""What a card says of a result that was trained after its conversion."""

import shlex
from collections.abc import Iterator
from dataclasses import fields

from hcsmoe_hub.machine.units import format_count, format_list, format_plural, format_seconds
from hcsmoe_hub.model_cards.card_data import CardData, name_of
from hcsmoe_hub.model_cards.command import shell
from hcsmoe_hub.model_cards.provenance import hub_dataset, text_of
from hcsmoe_hub.model_cards.quality import THIS, Table
from hcsmoe_hub.recovery.options import RecoverOptions, Train
from hcsmoe_hub.report import RecoveryRecord, RecoveryTeacher

NAMES = {Train.ROUTER: "the routers", Train.EXPERTS: "the experts", Train.NORMS: "the norms"}
ENDS = {
    "steps": "it ended after as many steps as were asked for",
    "time": "it ended when its time was over",
    "patience": "it ended early, as the score no longer improved",
}
# What sources and targets were made of, for models with an encoder.
SIDES = {
    "pairs": "pairs of source and target from {}",
    "spans": "{} with spans cut out, as in the pretraining of T5",
}
# Settings that have the names of options.
_OPTIONS = ("temperature", "kd_weight", "text_weight", "max_steps", "max_minutes", "evaluate_every", "patience")


def recovery(card: CardData) -> RecoveryRecord:
    """The training of a result that was trained."""
    assert card.report.recovery is not None, "only a training that there was is described"
    return card.report.recovery


def teacher(card: CardData) -> str:
    """The model whose logits it was trained on, in words."""
    found = recovery(card)["teacher"]
    if found["fingerprint"] == card.base.fingerprint:
        return "the base model"
    if found["repo_id"] is None:
        return f"`{found['path']}`"
    commit = "" if found["revision"] is None else f"/tree/{found['revision']}"
    return f"[{found['repo_id']}](https://huggingface.co/{found['repo_id']}{commit})"


def text(card: CardData) -> str:
    """The text that it was trained on, and which of it a decoder wrote if an encoder read the other part."""
    return SIDES.get(recovery(card)["data"].get("sides", ""), "{}").format(dataset(card))


def dataset(card: CardData) -> str:
    """Where that text is from."""
    return text_of(recovery(card)["data"]["dataset"])


def perplexity(card: CardData) -> str:
    """Name of the perplexity that chose the best state."""
    return "perplexity of the targets" if "source_length" in recovery(card)["data"] else "perplexity"


def trained(card: CardData) -> str:
    """What was trained: ``the routers, the experts and the norms``."""
    settings = recovery(card)["settings"]
    if Train.LORA in settings["train"]:
        return "all matrices of its layers"
    return format_list([NAMES[Train(part)] for part in settings["train"] if part in set(Train)])


def by_lora(card: CardData) -> str:
    """How that was trained, if it was not the tensors themselves."""
    rank = recovery(card)["settings"]["lora_rank"]
    return "" if rank is None else f", through LoRA of rank {rank}, which was then merged into them"


def aim(card: CardData) -> str:
    """What it was trained towards."""
    settings = recovery(card)["settings"]
    logits = f"the logits of {teacher(card)} (temperature {settings['temperature']:g})"
    if not settings["kd_weight"]:
        return "the text itself"
    return f"{logits} and on the text itself" if settings["text_weight"] else logits


def effort(card: CardData) -> str:
    """For how long it was trained, and what ended that."""
    record = recovery(card)
    seen, there = record["tokens"], record["data"]["tokens"]
    steps = f"{format_plural(record['steps'], 'step')} of {record['settings']['batch_tokens']:,} tokens"
    amount = f"{format_count(seen)} tokens in all, of {format_count(there)} that were there"
    return (
        f"{steps} in {format_seconds(record['seconds'])} ({amount}); {ENDS.get(record['stopped'], record['stopped'])}"
    )


def scores(card: CardData) -> Table:
    """What training brought on held-out text."""
    record = recovery(card)
    before, after = record["before"], record["after"]
    rows = [
        (perplexity(card), f"{before['perplexity']:.3f}", f"{after['perplexity']:.3f}"),
        ("KL from the teacher, nats per token", f"{before['kl']:.4f}", f"{after['kl']:.4f}"),
    ]
    title = f"{record['data']['held_out_tokens']:,} held-out tokens"
    title += ", sources included" if "source_length" in record["data"] else ""
    return Table((title, "before the training", THIS), rows)


def recover_command(card: CardData) -> str:
    """The command that trains it again: every setting that is not the default.

    A step that several processes or several batches made together is one batch here.
    """
    record = recovery(card)
    words = ["hcsmoe recover RESULT", f"--teacher {shlex.quote(_address(record['teacher']))}"]
    words.append(f"--data {shlex.quote(record['data']['dataset'])}")
    return shell(*words, *_settings(record))


def _address(found: RecoveryTeacher) -> str:
    """A teacher as the command line takes it."""
    if found["repo_id"] is None or found["revision"] is None:
        return name_of({"repo_id": found["repo_id"], "path": found["path"], "model_type": ""})
    return f"hf://{found['repo_id']}@{found['revision']}"


def _settings(record: RecoveryRecord) -> Iterator[str]:
    settings, data = record["settings"], record["data"]
    defaults = {field.name: field.default for field in fields(RecoverOptions)}
    default = RecoverOptions(teacher="", data="")
    if settings["train"] != list(default.train):
        yield f"--train {'+'.join(settings['train'])}"
    if settings["lora_rank"] is not None:
        yield f"--lora-rank {settings['lora_rank']}"
    yield f"--learning-rate {settings['learning_rate']:g}"
    yield f"--batch-size {settings['batch_tokens'] // data['sequence_length']}"
    yield f"--sequence-length {data['sequence_length']}"
    if data.get("is_split"):
        yield f"--source-length {data['source_length']}"
    if data["text_column"] is not None:
        yield f"--text-column {shlex.quote(data['text_column'])}"
    for name, value in settings.items():
        if name in _OPTIONS and value != defaults[name]:
            # Without patience, it is 0 that is typed.
            yield f"--{name.replace('_', '-')} {value or 0:g}"
    for name in ("held_out", "seed"):
        if settings[name] != defaults[name]:  # type: ignore[literal-required]
            yield f"--{name.replace('_', '-')} {settings[name]:g}"  # type: ignore[literal-required]
    if settings["top_logits"] is not None:
        yield f"--teacher-logits logits --top-logits {settings['top_logits']}"


def recovery_datasets(card: CardData) -> list[str]:
    """Datasets of the Hub that a recovery has trained on; none if it brought nothing."""
    if not card.is_recovered:
        return []
    sources = (part.rpartition("=")[0] or part for part in recovery(card)["data"]["dataset"].split(","))
    return [found for source in sources if (found := hub_dataset(source.strip())) is not None]
