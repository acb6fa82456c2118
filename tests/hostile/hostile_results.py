"""Reports, evaluations and whole results that are broken or hostile, for every command that reads them."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from places import GOLDEN

from hostile.hostile_configs import CONFIG, REMOTE, with_config
from hostile.hostile_headers import INDEX, WEIGHTS, Damage, with_bytes, with_entry, with_file, with_length

REPORT = "hcsmoe.json"
LIKE = (
    "convert",
    "model",
    "--like",
    "model",
    "--calibration",
    "ids.npy",
    "--device",
    "cpu",
    "--quiet",
    "--output",
    "out",
)
TEXT = "text.jsonl"
# Code that leaves a file behind if it runs.
CODE = "import pathlib\npathlib.Path('owned').touch()\nraise SystemExit(0)\n"
PICKLE = b"cpathlib\nPath\n(Vowned\ntRp0\n."


def sound_report() -> dict[str, Any]:
    """A report of a conversion."""
    content: dict[str, Any] = json.loads((GOLDEN / "cards" / "report.json").read_text("utf-8"))
    return content


def with_report(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Puts a report into the folder, of which something was changed; a value that is returned replaces it."""

    def damage(folder: Path) -> None:
        report = sound_report()
        changed = change(report)
        (folder / REPORT).write_text(json.dumps(report if changed is None else changed))

    return damage


def _set(*path: Any, value: Any) -> Damage:
    def change(report: Any) -> None:
        for step in path[:-1]:
            report = report[step]
        report[path[-1]] = value

    return with_report(change)


REPORTS: dict[str, Damage] = {
    "empty": with_file(REPORT, b""),
    "binary": with_file(REPORT, bytes(range(256)) * 16),
    "a list": with_file(REPORT, b"[]"),
    "deep": with_file(REPORT, b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "many lists": with_file(REPORT, b'{"a": [' + b"[]," * 12_000_000 + b"[]]}"),
    "latin-1": with_file(REPORT, '{"schema_version": "é"}'.encode("latin-1")),
    "not a number": with_file(REPORT, b'{"schema_version": NaN}'),
    "a huge version": _set("schema_version", value=10**400),
    "a version of text": _set("schema_version", value="2"),
    "no layers": _set("layers", value=[]),
    "layers are null": _set("layers", value=None),
    "a layer is a list": _set("layers", 0, value=[]),
    "labels out of range": _set("layers", 0, "labels", 0, value=99),
    "labels negative": _set("layers", 0, "labels", 0, value=-2),
    "labels of a million": _set("layers", 0, "labels", value=[0] * 1_000_000),
    "dominant empty": _set("layers", 0, "dominant", value=[]),
    "usage of text": _set("layers", 0, "usage", value=["1"] * 8),
    "an error that is infinite": _set("layers", 0, "output_error", value=1e308),
    "an unknown method": _set("method", "method", value="evil"),
    "a method of numbers": _set("method", value=5),
}
COMMANDS: dict[str, tuple[str, ...]] = {
    "inspect": ("inspect", "model", "--layer", "0"),
    "verify": ("verify", "model"),
    "card": ("card", "model"),
    "evaluate": ("evaluate", "model", "--perplexity", TEXT),
    "push": ("push", "model", "someone/something"),
    "like": LIKE,
}


def _escaping(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "../model/" + WEIGHTS}}))
    (folder / WEIGHTS).rename(folder / "model-00001-of-00001.safetensors")


def _with_code(folder: Path) -> None:
    """A checkpoint of an unknown type that brings code for everything, and weights as a pickle."""
    with_config(model_type="evil", auto_map=REMOTE)(folder)
    for name in ("evil.py", "modeling_evil.py", "tokenization_evil.py", "setup.py", "conftest.py", "sitecustomize.py"):
        (folder / name).write_text(CODE)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(CODE)
    (folder / "pytorch_model.bin").write_bytes(PICKLE)
    (folder / WEIGHTS).unlink()


FOLDERS: dict[str, Damage] = {
    "a header that is cut": with_length(10**6),
    "a header of deep lists": with_bytes(b"[" * 100_000 + b"]" * 100_000),
    "a header without tensors": with_bytes(b"{}"),
    "offsets that overlap": with_entry(data_offsets=[0, 4]),
    "an index that escapes": _escaping,
    "a config of another model": with_config(hidden_size=48),
    "a config that is deep": with_file(CONFIG, b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "code for everything": _with_code,
}


_FINE_FOR_CARDS = ("a config of another model", "code for everything")


def results() -> Iterator[tuple[str, Damage, tuple[str, ...]]]:
    """Every broken result by name, with the command that reads it."""
    for name, damage in REPORTS.items():
        for command in ("inspect", "card", "like"):
            yield f"{command}: report: {name}", damage, COMMANDS[command]
    for name, damage in FOLDERS.items():
        for command, words in COMMANDS.items():
            # A card is drawn from the report and the config; it does not look at weights or code.
            if command != "card" or name not in _FINE_FOR_CARDS:
                yield f"{command}: {name}", _both(with_report(lambda report: None), damage), words


def _both(first: Damage, second: Damage) -> Damage:
    def damage(folder: Path) -> None:
        first(folder)
        second(folder)

    return damage
