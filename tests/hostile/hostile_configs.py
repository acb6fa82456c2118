"""Configs, tokenizers, templates, calibration files, reports and statistics that are broken or hostile."""

import gzip
import io
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from hostile.hostile_headers import Damage, with_file

CONFIG = "config.json"
BINARY = bytes(range(255, -1, -1)) * 16
WRONG = {
    "huge": 10**12,
    "beyond 64 bits": 2**70,
    "negative": -4,
    "zero": 0,
    "a float": 8.5,
    "text": "8",
    "a list": [8, 4],
    "an object": {"value": 8},
    "true": True,
    "an empty list": [],
}
COUNTS = (
    "num_local_experts",
    "num_experts_per_tok",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)


def with_config(**values: Any) -> Damage:
    """Changes keys of the config."""

    def damage(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).unlink()
        (folder / CONFIG).write_text(json.dumps(config | values))

    return damage


def without_config(key: str) -> Damage:
    """Takes a key out of the config."""

    def damage(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        del config[key]
        (folder / CONFIG).unlink()
        (folder / CONFIG).write_text(json.dumps(config))

    return damage


TYPES: tuple[Any, ...] = (
    "",
    "no_such_model",
    "../mixtral",
    5,
    None,
    ["mixtral"],
    {"a": 1},
    "bert",
    "llama",
    "t5",
    "mixtral\0",
)
# Code of the checkpoint's own, which must never run.
REMOTE = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
OTHERS: dict[str, Damage] = {
    "auto_map of unknown type": with_config(model_type="evil", auto_map=REMOTE),
    "auto_map of another repository": with_config(model_type="evil", auto_map={"AutoConfig": "org/repo--evil.Config"}),
    "experts that disagree with the weights": with_config(num_local_experts=16),
    "aliases that disagree": with_config(num_experts=4, n_routed_experts=6),
    "top-k above the experts": with_config(num_experts_per_tok=9),
    "heads that do not divide": with_config(num_attention_heads=7),
    "unknown activation": with_config(hidden_act="no_such_activation"),
    "activation is a list": with_config(hidden_act=["silu"]),
    "rope of an unknown kind": with_config(rope_parameters={"rope_type": "no_such_rope", "rope_theta": 1e4}),
    "rope is text": with_config(rope_parameters="default"),
    "quantisation is text": with_config(quantization_config="fp8"),
    "quantisation is a list": with_config(quantization_config=["fp8"]),
    "architectures is a number": with_config(architectures=5, model_type="no_such_model"),
    "dtype unknown": with_config(dtype="float7", torch_dtype="float7"),
    "norm is text": with_config(rms_norm_eps="small"),
    "empty": with_file(CONFIG, b""),
    "not json": with_file(CONFIG, b"{]"),
    "a list": with_file(CONFIG, b"[]"),
    "null": with_file(CONFIG, b"null"),
    "an empty object": with_file(CONFIG, b"{}"),
    "latin-1": with_file(CONFIG, '{"model_type": "é"}'.encode("latin-1")),
    "utf-16": with_file(CONFIG, '{"model_type": "mixtral"}'.encode("utf-16")),
    "deep": with_file(CONFIG, b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "deep below the limit": with_file(CONFIG, b'{"model_type": "mixtral", "a":' + b'{"a":' * 900 + b"1" + b"}" * 901),
    "many megabytes": with_file(CONFIG, b'{"model_type": "mixtral", "a": [' + b"[]," * 12_000_000 + b"[]]}"),
    "binary": with_file(CONFIG, bytes(range(256)) * 16),
}


def configs() -> Iterator[tuple[str, Damage]]:
    """Every broken config by name."""
    for key in COUNTS:
        for name, value in WRONG.items():
            yield f"config: {key} is {name}", with_config(**{key: value})
        # transformers has defaults for these two, which are the tiny model's own.
        if key not in ("num_local_experts", "num_experts_per_tok"):
            yield f"config: {key} missing", without_config(key)
    for value in TYPES:
        yield f"config: model_type {value!r}", with_config(model_type=value)
    for name, damage in OTHERS.items():
        yield f"config: {name}", damage


TOKENIZERS: dict[str, bytes] = {
    "empty": b"",
    "not json": b"{]",
    "a list": b"[]",
    "null": b"null",
    "an empty object": b"{}",
    "binary": bytes(range(256)) * 16,
    "no model": b'{"version": "1.0"}',
    "unknown model": b'{"version": "1.0", "model": {"type": "Evil"}}',
    "vocabulary of text": b'{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": "0"}, "merges": []}}',
    "negative id": b'{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}',
    "merge of unknown": b'{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["x y"]}}',
    "ids beyond the vocabulary": b'{"model": {"type": "WordLevel", "vocab": {"a": 99999}, "unk_token": "a"}}',
    "deep": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
}
TEMPLATES: dict[str, str] = {
    "a loop without end": "{% for a in range(10**9) %}{% for b in range(10**9) %}x{% endfor %}{% endfor %}",
    "text without end": "{{ 'x' * (10 ** 11) }}",
    "a nested product": "{{ ('x' * 10**6) * 10**6 }}",
    "attributes of the interpreter": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "an import": "{{ self.__init__.__globals__.__builtins__.__import__('os').system('touch owned') }}",
    "cycler": "{{ cycler.__init__.__globals__.os.popen('touch owned').read() }}",
    "not a template": "{% if %}",
    "an exception": "{{ raise_exception('no') }}",
    "an undefined name": "{{ nothing.at.all }}",
    "recursion": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "a huge power": "{{ 9 ** (9 ** 9) }}",
    "a huge power that is shown": "{{ (9 ** (9 ** 7)) | string | length }}",
    "a list without end": "{{ range(10 ** 9) | list }}",
    "text that is doubled": (
        "{% set n = namespace(x='x' * 1000) %}{% for a in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}"
    ),
    "a sum without end": "{{ [range(99999), range(99999), range(99999)] | sum(start=[]) }}",
    "macros that call each other": (
        "{% macro a() %}{{ b() }}{% endmacro %}{% macro b() %}{{ a() }}{% endmacro %}{{ b() }}"
    ),
    "padding without end": "{{ 'x'.center(10 ** 10) }}",
    "a format without end": "{{ '%9999999999d' % 1 }}",
    "an include": "{% include '/etc/passwd' %}",
}


def with_template(template: str) -> Damage:
    """Gives the tokenizer a chat template."""

    def damage(folder: Path) -> None:
        (folder / "chat_template.jinja").write_text(template)

    return damage


def _huge(name: str) -> Damage:
    """A file of a gigabyte that takes no room on most disks."""

    def damage(folder: Path) -> None:
        with (folder / name).open("wb") as file:
            file.truncate(10**9)

    return damage


def tokenizers() -> Iterator[tuple[str, Damage]]:
    """Every broken tokenizer by name."""
    for name, content in TOKENIZERS.items():
        yield f"tokenizer: {name}", with_file("tokenizer.json", content)
    for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "chat_template.jinja"):
        yield f"tokenizer: a gigabyte of {name}", _huge(name)


def templates() -> Iterator[tuple[str, Damage]]:
    """Every hostile chat template by name."""
    for name, template in TEMPLATES.items():
        yield f"template: {name}", with_template(template)


def npy(dtype: str, shape: tuple[int, ...], data: bytes) -> bytes:
    """A file of an array whose header claims a shape, whatever its data is."""
    header = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


LINE = b'{"text": "' + b"word " * 50 + b'"}\n'
TEXTS: dict[str, tuple[str, bytes]] = {
    "binary": ("text.jsonl", BINARY),
    "empty": ("text.jsonl", b""),
    "blank lines": ("text.jsonl", b"\n\n\n"),
    "invalid in line 3": ("text.jsonl", LINE * 2 + b"{]\n" + LINE),
    "lists": ("text.jsonl", b"[1, 2]\n" * 20),
    "numbers": ("text.jsonl", b"5\n" * 20),
    "null text": ("text.jsonl", b'{"text": null}\n' * 20),
    "text of numbers": ("text.jsonl", b'{"text": 5}\n' * 20),
    "no text": ("text.jsonl", b'{"words": "a"}\n' * 20),
    "latin-1": ("text.jsonl", '{"text": "é"}\n'.encode("latin-1") * 20),
    "utf-16": ("text.jsonl", '{"text": "a"}\n'.encode("utf-16") * 20),
    "zero bytes": ("text.txt", bytes(4096)),
    "a line of 20 MB": ("text.jsonl", b'{"text": "' + b"x" * 20_000_000 + b'"\n'),
    "not parquet": ("text.parquet", b"PAR1" + bytes(64) + b"PAR1"),
    "empty parquet": ("text.parquet", b""),
    "not an array": ("ids.npy", b"\x93NUMPY\x01\x00"),
    "a pickled array": ("ids.npy", npy("|O", (1,), b"\x80\x04.")),
    "an array that claims too much": ("ids.npy", npy("<i8", (100_000_000_000, 8), bytes(64))),
    "an array of floats": ("ids.npy", npy("<f4", (2, 2), bytes(16))),
    "an array of text": ("ids.npy", npy("<U4", (2,), bytes(32))),
    "an array of three dimensions": ("ids.npy", npy("<i8", (2, 2, 2), bytes(64))),
    "an array of nothing": ("ids.npy", npy("<i8", (0, 8), b"")),
    "an array that is cut": ("ids.npy", npy("<i8", (4, 16), bytes(64))),
    "negative ids": ("ids.npy", npy("<i8", (1, 2), b"\xff" * 16)),
    "ids beyond the vocabulary": ("ids.npy", npy("<i4", (1, 2), b"\xff\xff\xff\x7f" * 2)),
    "unknown ending": ("text.exe", b"MZ"),
    "gzip that is not": ("text.jsonl.gz", b"\x1f\x8b" + bytes(32)),
}


def _compressed(parts: Iterable[bytes]) -> bytes:
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=1) as file:
        for part in parts:
            file.write(part)
    return buffer.getvalue()


# Made when they are needed.
LONG_TEXTS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "a line of 60 MB": ("text.jsonl", lambda: LINE + b'{"text": "' + b"x" * 60_000_000 + b'"}\n'),
    "a line nested 50,000 deep": (
        "text.jsonl",
        lambda: LINE + b'{"text": "a", "b": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001 + b"\n",
    ),
    "lists nested 100,000 deep": ("text.json", lambda: b"[" * 100_000 + b"]" * 100_000),
    "a list with a text of 60 MB": ("text.json", lambda: b'[{"text": "' + b"x" * 60_000_000 + b'"}]'),
    "a gigabyte in a line, compressed": (
        "text.jsonl.gz",
        lambda: _compressed([b'{"text": "', *([b"x" * 1_000_000] * 1000), b'"}']),
    ),
    "a gigabyte without a blank line, compressed": (
        "text.txt.gz",
        lambda: _compressed([b"a line of text\n" * 100_000] * 700),
    ),
    "a row of a table of 60 MB": ("text.csv", lambda: b"text,b\n" + b"x" * 60_000_000 + b",1\n"),
    "a quotation mark that is not closed": ("text.csv", lambda: b'text,b\n"' + b"abc,def\n" * 9_000_000),
    "invalid in line 100,001": ("text.jsonl", lambda: LINE * 100_000 + b'{"text": "a"\n' + LINE * 100_000),
    "an archive of a line of 60 MB": (
        "text.jsonl.zip",
        lambda: _archive({"a.jsonl": LINE + b'{"text": "' + b"x" * 60_000_000 + b'"}\n'}, compressed=True),
    ),
}


def _archive(entries: dict[str, bytes], *, compressed: bool = False) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


STATISTICS: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "binary": lambda: BINARY,
    "an empty archive": lambda: _archive({}),
    "another archive": lambda: _archive({"a.txt": b"a"}),
    "content is not json": lambda: _archive({"statistics.json": b"{]"}),
    "content is a list": lambda: _archive({"statistics.json": b"[]"}),
    "content of another format": lambda: _archive({"statistics.json": b'{"format": "other"}'}),
    "content deep": lambda: _archive({"statistics.json": b'{"a":' * 100_000 + b"1" + b"}" * 100_000}),
    "a bomb": lambda: _archive({"statistics.json": b" " * 1_500_000_000}, compressed=True),
    "cut": lambda: _archive({"statistics.json": b"{}"})[:-10],
    "many members": lambda: _archive({f"{number}.safetensors": b"" for number in range(200_000)}),
    "members that escape": lambda: _archive({"../statistics.json": b"{}", "/statistics.json": b"{}"}),
    "values of other kinds": lambda: _archive(
        {"statistics.json": b'{"format": "hcsmoe-statistics", "version": 1, "layers": "0"}'}
    ),
    "an unknown packing": lambda: _archive({"statistics.json": b"{}"}).replace(b"\x14\0\0\0\0\0", b"\x14\0\0\0\x63\0"),
    "version of the future": lambda: _archive({"statistics.json": b'{"format": "hcsmoe-statistics", "version": 99}'}),
}
