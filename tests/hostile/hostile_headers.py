"""Safetensors headers and indexes that lie: each changes one checkpoint that was sound."""

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Damages the checkpoint in a folder.
Damage = Callable[[Path], None]

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def read(folder: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of the only shard."""
    content = (folder / WEIGHTS).read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def write(folder: Path, header: bytes, data: bytes, *, length: int | None = None) -> None:
    """Writes the only shard; ``length`` is what it says of the size of its header."""
    size = len(header) if length is None else length
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", size) + header + data)


def with_header(change: Callable[[dict[str, Any], str], object]) -> Damage:
    """Changes the header, which is given with the name of its largest tensor; a value that is returned replaces it."""

    def damage(folder: Path) -> None:
        header, data = read(folder)
        name = max((key for key in header if key != "__metadata__"), key=lambda key: header[key]["data_offsets"][1])
        changed = change(header, name)
        write(folder, json.dumps(header if changed is None else changed).encode(), data)

    return damage


def with_bytes(header: bytes, *, length: int | None = None) -> Damage:
    """Puts other bytes in the place of the header."""
    return lambda folder: write(folder, header, read(folder)[1], length=length)


def with_length(length: int) -> Damage:
    """Changes only what a shard says of the size of its header."""

    def damage(folder: Path) -> None:
        header, data = read(folder)
        write(folder, json.dumps(header).encode(), data, length=length)

    return damage


def with_entry(**values: Any) -> Damage:
    """Changes keys of one tensor's entry."""
    return with_header(lambda header, name: header[name].update(values))


def with_file(name: str, content: bytes) -> Damage:
    """Replaces a whole file."""
    return lambda folder: _put(folder / name, content)


def _put(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(content)


LENGTHS = (0, 1, 2, 7, 100, 10**6, 10**8, 10**8 + 1, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1)
NOT_HEADERS = {
    "empty": b"",
    "spaces": b" " * 64,
    "a list": b"[]",
    "a string": b'"header"',
    "a number": b"12",
    "null": b"null",
    "not json": b"{]",
    "unfinished": b'{"a": {"dtype": "F32"',
    "single quotes": b"{'a': 1}",
    "trailing text": b"{} {}",
    "latin-1": '{"é": 1}'.encode("latin-1"),
    "utf-16": '{"a": 1}'.encode("utf-16"),
    "broken utf-8": b'{"\xff\xfe": {}}',
    "lone surrogate": b'{"\\ud800": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}',
    "surrogates in utf-8": b'{"\xed\xa0\x80": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}',
    "overlong utf-8": b'{"\xc0\xaf": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}',
    "utf-32": '{"a": 1}'.encode("utf-32"),
    "byte order mark": b"\xef\xbb\xbf{}",
    "not a number": b'{"a": NaN}',
    "infinity": b'{"a": Infinity}',
    "deep lists": b"[" * 100_000 + b"]" * 100_000,
    "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "a huge integer": b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 4]}}',
    "many empty lists": b'{"a": [' + b"[]," * 2_000_000 + b"[]]}",
    "many keys": b"{" + b",".join(b'"%d": 0' % number for number in range(500_000)) + b"}",
    "no tensors": b'{"__metadata__": {"format": "pt"}}',
    "zero bytes": bytes(64),
}
ENTRIES: dict[str, dict[str, Any]] = {
    "dtype unknown": {"dtype": "F33"},
    "dtype number": {"dtype": 32},
    "dtype null": {"dtype": None},
    "dtype list": {"dtype": ["F32"]},
    "dtype lower case": {"dtype": "f32"},
    "dtype of another size": {"dtype": "F64"},
    "dtype of the same size": {"dtype": "I16"},
    "shape missing": {"shape": None},
    "shape text": {"shape": "8x8"},
    "shape of text": {"shape": ["8", "8"]},
    "shape of floats": {"shape": [8.0, 8.0]},
    "shape of booleans": {"shape": [True, True]},
    "shape negative": {"shape": [-8, -8]},
    "shape huge": {"shape": [2**40, 2**40]},
    "shape beyond 64 bits": {"shape": [2**70]},
    "shape empty": {"shape": []},
    "shape with zero": {"shape": [0, 8]},
    "shape of many ones": {"shape": [1] * 10_000},
    "shape nested": {"shape": [[8], [8]]},
    "shape transposed and wrong": {"shape": [7, 9]},
    "offsets missing": {"data_offsets": None},
    "offsets text": {"data_offsets": "0-4"},
    "offsets one": {"data_offsets": [0]},
    "offsets three": {"data_offsets": [0, 4, 8]},
    "offsets negative": {"data_offsets": [-4, 0]},
    "offsets reversed": {"data_offsets": [8, 0]},
    "offsets floats": {"data_offsets": [0.0, 4.0]},
    "offsets beyond the file": {"data_offsets": [0, 2**40]},
    "offsets beyond 64 bits": {"data_offsets": [2**70, 2**71]},
    "offsets at the end": {"data_offsets": [2**33, 2**33 + 4]},
    "offsets overlapping": {"data_offsets": [0, 4]},
}


def _first_is_list(header: dict[str, Any], name: str) -> None:
    header[name] = []


def _first_is_null(header: dict[str, Any], name: str) -> None:
    header[name] = None


def _drop(header: dict[str, Any], name: str) -> None:
    del header[name]


def _twice(header: dict[str, Any], name: str) -> None:
    header["another." + name] = header[name]


def _gap(header: dict[str, Any], name: str) -> None:
    for entry in (entry for key, entry in header.items() if key != "__metadata__"):
        entry["data_offsets"] = [place + 8 for place in entry["data_offsets"]]


def _metadata_as_tensor(header: dict[str, Any], name: str) -> None:
    header["__metadata__"] = header.pop(name)


def _escaping_name(header: dict[str, Any], name: str) -> None:
    header["../../" + name] = header.pop(name)


def _long_name(header: dict[str, Any], name: str) -> None:
    header["x" * 1_000_000] = header.pop(name)


HEADERS: dict[str, Damage] = {
    "entry is a list": with_header(_first_is_list),
    "entry is null": with_header(_first_is_null),
    "tensor dropped": with_header(_drop),
    "tensor listed twice": with_header(_twice),
    "gap before the data": with_header(_gap),
    "tensor hidden as metadata": with_header(_metadata_as_tensor),
    "name that escapes": with_header(_escaping_name),
    "name of a million letters": with_header(_long_name),
}


def _cut(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    _put(folder / WEIGHTS, content[:-1])


def _longer(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    _put(folder / WEIGHTS, content + b"\0")


def _duplicate_keys(folder: Path) -> None:
    header, data = read(folder)
    name = next(key for key in header if key != "__metadata__")
    text = json.dumps(header)
    write(
        folder, (text[:-1] + f', "{name}": {{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}}}').encode(), data
    )


def _twice_in_an_entry(folder: Path) -> None:
    header, data = read(folder)
    text = json.dumps(header).replace('"dtype": "F32"', '"dtype": "F32", "dtype": "I32"', 1)
    write(folder, text.encode(), data)


def _many_megabytes(folder: Path) -> None:
    write(folder, b'{"a":"' + b"x" * 99_000_000 + b'"}', read(folder)[1])


FILES: dict[str, Damage] = {
    "file cut by a byte": _cut,
    "file longer by a byte": _longer,
    "duplicate keys": _duplicate_keys,
    "duplicate keys in an entry": _twice_in_an_entry,
    "header of 99 MB": _many_megabytes,
    "empty file": with_file(WEIGHTS, b""),
    "file of 4 bytes": with_file(WEIGHTS, b"\1\0\0\0"),
    "a pickle": with_file(WEIGHTS, b"\x80\x04\x95\x0c\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94."),
    "a page of HTML": with_file(WEIGHTS, b"<!doctype html><title>404</title>"),
    "a Git LFS pointer": with_file(
        WEIGHTS, b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12\n"
    ),
}


def headers() -> Iterator[tuple[str, Damage]]:
    """Every broken header by name."""
    for length in LENGTHS:
        yield f"header length {length}", with_length(length)
    for name, content in NOT_HEADERS.items():
        yield f"header: {name}", with_bytes(content)
    for name, values in ENTRIES.items():
        yield f"header: {name}", with_entry(**values)
    for name, damage in (HEADERS | FILES).items():
        yield f"header: {name}", damage


ESCAPES = (
    "../model.safetensors",
    "..\\model.safetensors",
    "a/../../model.safetensors",
    "/etc/passwd",
    "//server/share/model.safetensors",
    "\\\\server\\share\\model.safetensors",
    "C:\\model.safetensors",
    "C:model.safetensors",
    "c:/model.safetensors",
    "\\model.safetensors",
    "..",
    ".",
    "",
    " ",
    "./../x.safetensors",
    "a/b/../../../x.safetensors",
    "file:///etc/passwd",
    "https://example.org/model.safetensors",
    "model.safetensors\0.txt",
    "model\n.safetensors",
    "~/model.safetensors",
    "model.bin",
    "config.json",
    "no-such-shard.safetensors",
    "x" * 5000 + ".safetensors",
    "..%2Fmodel.safetensors",
    "%2e%2e/model.safetensors",
    "..%5Cmodel.safetensors",
    ".../model.safetensors",
    ".. /model.safetensors",
    "../",
    "./..",
    "model.safetensors.",
    "model.safetensors ",
    "\\\\?\\C:\\model.safetensors",
    "//?/C:/model.safetensors",
    "\\\\.\\PhysicalDrive0",
    "C:..\\model.safetensors",
    "a\\..\\..\\model.safetensors",
    "/proc/self/mem",
    "CON",
    "\u2025/model.safetensors",
    "\uff0e\uff0e/model.safetensors",
)


def _with_map(make: Callable[[list[str]], object]) -> Damage:
    """Renames the only shard to one that an index lists; the index is made of the names of its tensors."""

    def damage(folder: Path) -> None:
        header, _ = read(folder)
        names = [key for key in header if key != "__metadata__"]
        (folder / WEIGHTS).rename(folder / "model-00001-of-00001.safetensors")
        content = make(names)
        _put(folder / INDEX, content if isinstance(content, bytes) else json.dumps(content).encode())

    return damage


SHARD = "model-00001-of-00001.safetensors"
INDEXES: dict[str, Callable[[list[str]], object]] = {
    "empty": lambda names: b"",
    "not json": lambda names: b"{]",
    "a list": lambda names: [],
    "null": lambda names: None,
    "no map": lambda names: {"metadata": {}},
    "map is null": lambda names: {"weight_map": None},
    "map is a list": lambda names: {"weight_map": names},
    "map is empty": lambda names: {"weight_map": {}},
    "shards are numbers": lambda names: {"weight_map": dict.fromkeys(names, 1)},
    "shards are lists": lambda names: {"weight_map": {key: [SHARD] for key in names}},
    "shards are null": lambda names: {"weight_map": dict.fromkeys(names)},
    "a tensor too many": lambda names: {"weight_map": dict.fromkeys([*names, "more.weight"], SHARD)},
    "another shard for one": lambda names: {"weight_map": {**dict.fromkeys(names, SHARD), names[0]: "b.safetensors"}},
    "itself": lambda names: {"weight_map": dict.fromkeys(names, INDEX)},
    "deep": lambda names: b'{"weight_map":' * 50_000 + b"1" + b"}" * 50_000,
    "latin-1": lambda names: '{"weight_map": {"é": "a"}}'.encode("latin-1"),
    "utf-16": lambda names: json.dumps({"weight_map": dict.fromkeys(names, SHARD)}).encode("utf-16"),
    "many megabytes": lambda names: b'{"weight_map": {' + b",".join(b'"%d":""' % n for n in range(3_000_000)) + b"}}",
    "many lists": lambda names: b'{"a": [' + b"[]," * 12_000_000 + b"[]]}",
    "binary": lambda names: bytes(range(256)) * 16,
}


def indexes() -> Iterator[tuple[str, Damage]]:
    """Every broken index by name."""
    for number, escape in enumerate(ESCAPES):
        yield (
            f"index: shard {number} {escape[:30]!r}",
            _with_map(lambda names, to=escape: {"weight_map": dict.fromkeys(names, to)}),
        )
    for name, make in INDEXES.items():
        yield f"index: {name}", _with_map(make)
