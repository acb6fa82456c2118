"""Readers of somebody else's files: any bytes give a value or one known failure, and sound files come back as they are.

The same readers are fuzzed for longer with ``python tests/fuzz/fuzz_readers.py``.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fuzz.json_mutator import mutate_json
from fuzz.readers import READERS, read_config, read_conversion_report, read_header, read_index
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from hcsmoe_hub.checkpoint.bounded_json import parse_bounded
from hcsmoe_hub.checkpoint.tensors import DTYPES, PAIRS

# The same examples in every run, and few: this is a test, not a search.
settings.register_profile(
    "hcsmoe",
    derandomize=True,
    max_examples=30,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("hcsmoe")

JSON = some.recursive(
    some.none() | some.booleans() | some.integers() | some.floats() | some.text(max_size=8),
    lambda inner: some.lists(inner, max_size=4) | some.dictionaries(some.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
NAMES = some.text(some.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[bytes]]:
    """Sound files of every reader but the one of statistics, which takes a conversion to make."""
    return {
        name: reader.seeds(tmp_path_factory.mktemp(name)) for name, reader in READERS.items() if not reader.is_archive
    }


def keys_of(value: Any) -> Iterator[str]:
    """Every key in a JSON value."""
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from keys_of(inner)
    yield from value if isinstance(value, dict) else ()


@pytest.mark.parametrize("name", READERS)
@given(content=some.binary(max_size=200))
def test_any_bytes_give_a_value_or_a_known_failure(tmp_path: Path, name: str, content: bytes) -> None:
    READERS[name].opened(tmp_path)(content)


@pytest.mark.parametrize("name", [name for name, reader in READERS.items() if not reader.is_archive])
@given(value=JSON)
def test_any_json_gives_a_value_or_a_known_failure(tmp_path: Path, name: str, value: Any) -> None:
    text = json.dumps(value).encode()
    READERS[name].opened(tmp_path)(len(text).to_bytes(8, "little") + text if name == "header" else text)


@pytest.mark.parametrize("name", ["index", "config", "report"])
@given(seed=some.integers(0, 2**32))
def test_a_sound_file_with_a_changed_value_gives_a_value_or_a_known_failure(
    seeds: dict[str, list[bytes]], tmp_path: Path, name: str, seed: int
) -> None:
    sound = random.Random(seed).choice(seeds[name])
    changed = mutate_json(sound, seed, sorted(set(keys_of(json.loads(sound)))))
    READERS[name].opened(tmp_path)(sound if changed is None else changed)


@pytest.mark.parametrize("name", ["header", "index", "config", "report"])
def test_sound_files_are_read(seeds: dict[str, list[bytes]], tmp_path: Path, name: str) -> None:
    if name == "index":
        for number in (1, 2):
            (tmp_path / f"model-{number:05}-of-00002.safetensors").touch()
        READERS[name].read(tmp_path, seeds[name][0])
        return
    sound = [seed for seed in seeds[name] if b'"schema_version"' in seed] if name == "report" else seeds[name]
    for seed in sound:
        READERS[name].read(tmp_path, seed)


@given(
    entries=some.dictionaries(
        NAMES, some.tuples(some.sampled_from(sorted(DTYPES)), some.lists(some.integers(0, 3), max_size=3)), max_size=5
    )
)
def test_a_header_comes_back_as_it_was_written(tmp_path: Path, entries: dict[str, tuple[str, list[int]]]) -> None:
    header, end = {}, 0
    for name, (dtype, shape) in entries.items():
        if DTYPES[dtype] in PAIRS:
            shape = [*shape, 2]
        count = 1
        for size in shape:
            count *= size
        nbytes = count * DTYPES[dtype].itemsize // (2 if DTYPES[dtype] in PAIRS else 1)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
    # Wrappers of a model and adapters leave prefixes, which are read in a way of their own.
    text = json.dumps({f"w.{name}": entry for name, entry in header.items()}).encode()
    found = read_header(tmp_path, len(text).to_bytes(8, "little") + text + bytes(end))
    assert {name: tensor.header_shape for name, tensor in found.items()} == {
        f"w.{name}": entry["shape"] for name, entry in header.items()
    }


@given(names=some.lists(NAMES, min_size=1, max_size=5, unique=True))
def test_an_index_comes_back_as_it_was_written(tmp_path: Path, names: list[str]) -> None:
    shard = "model-00001-of-00001.safetensors"
    (tmp_path / shard).touch()
    placed = dict.fromkeys(names, shard)
    assert read_index(tmp_path, json.dumps({"metadata": {}, "weight_map": placed}).encode()) == placed


def test_a_config_and_a_report_come_back_as_they_were_written(seeds: dict[str, list[bytes]], tmp_path: Path) -> None:
    for config in seeds["config"]:
        assert read_config(tmp_path, config) == json.loads(config)
    written = next(json.loads(seed) for seed in seeds["report"] if b'"schema_version": 2' in seed)
    assert read_conversion_report(tmp_path, json.dumps(written).encode()) == written


@given(value=JSON)
def test_json_that_is_not_ambiguous_is_parsed_as_python_does(value: Any) -> None:
    text = json.dumps(value)
    assert repr(parse_bounded(text.encode())) == repr(json.loads(text))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b'{"a": 1, "a": 2}', "two values"),
        (b'{"a": [{"b": 1, "b": [1]}]}', "two values"),
        ('{"a": 1}'.encode("utf-16"), "decode"),
        (b'{"\xff": 1}', "decode"),
        (b'"\xed\xa0\x80"', "decode"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_json_that_programs_read_in_different_ways_is_refused(text: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_bounded(text)


def test_a_name_that_has_one_value_twice_is_not_ambiguous() -> None:
    assert parse_bounded(b'{"a": [1], "a": [1]}') == {"a": [1]}
