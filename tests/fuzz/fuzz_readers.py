"""Coverage-guided fuzzing of the readers of somebody else's files, with atheris.

One target per reader: ``python tests/fuzz/fuzz_readers.py header -max_total_time=600``. Other arguments are those of
libFuzzer. Whatever a file holds, a reader returns a value or raises an HcsmoeError; anything else ends the run, and the
input that did it is written to ``crash-...``.
"""

import io
import json
import os
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import atheris

# Instrumented where the readers are; what they call of other libraries only costs time.
with atheris.instrument_imports(include=["hcsmoe_hub"], enable_loader_override=False):
    import hcsmoe_hub.checkpoint.source
    import hcsmoe_hub.observation.statistics_file
    import hcsmoe_hub.report.read  # noqa: F401

from fuzz.json_mutator import mutate_json
from fuzz.readers import READERS, Reader


def _words(seeds: list[bytes]) -> list[str]:
    """Every key in the seeds."""
    found = set[str]()

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found.update(key for key, _ in pairs)
        return dict(pairs)

    for seed in seeds:
        try:
            json.loads(seed, object_pairs_hook=collect)
        except ValueError:
            continue
    return sorted(found) or ["a"]


def _mutated_archive(data: bytes, max_size: int, seed: int, words: list[str]) -> bytes:
    """An archive with one member changed: its checksum fits, so that the reader opens it."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError, RuntimeError, EOFError):
        return atheris.Mutate(data, max_size)
    if not members:
        return atheris.Mutate(data, max_size)
    name = list(members)[seed % len(members)]
    members[name] = _mutated(members[name], max_size, seed, words)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for member, content in members.items():
            archive.writestr(zipfile.ZipInfo(member), content)
    return buffer.getvalue()


def _mutated(data: bytes, max_size: int, seed: int, words: list[str]) -> bytes:
    """A text of JSON, or a safetensors file, changed as JSON or as bytes."""
    if seed % 4 == 0:
        return bytes(atheris.Mutate(data, max_size))
    length = int.from_bytes(data[:8], "little")
    if data[:1] not in (b"{", b"[") and 8 + length <= len(data):
        header = mutate_json(data[8 : 8 + length], seed, words)
        if header is not None:
            return len(header).to_bytes(8, "little") + header + data[8 + length :]
    changed = mutate_json(data, seed, words)
    return bytes(atheris.Mutate(data, max_size)) if changed is None else changed


def _mutator(reader: Reader, words: list[str]) -> Callable[[bytes, int, int], bytes]:
    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        if reader.is_archive and seed % 8:
            changed = _mutated_archive(data, max_size, seed, words)
        else:
            changed = _mutated(data, max_size, seed, words)
        return changed if len(changed) <= max_size else bytes(atheris.Mutate(data, max_size))

    return mutate


def main(readers: Mapping[str, Reader] = READERS) -> None:
    """Fuzzes the reader that the first argument names."""
    if len(sys.argv) < 2 or sys.argv[1] not in readers:
        raise SystemExit(f"usage: fuzz_readers.py {{{','.join(readers)}}} [LIBFUZZER OPTIONS]")
    reader = readers[sys.argv.pop(1)]
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as place:
        seeds = reader.seeds(Path(place))
        corpus, folder = Path(place) / "corpus", Path(place) / "read"
        for made in (corpus, folder):
            made.mkdir()
        for number, seed in enumerate(seeds):
            (corpus / f"seed-{number}").write_bytes(seed)
        read = reader.opened(folder)
        arguments = [sys.argv[0], "-max_len=200000", "-rss_limit_mb=4096", "-timeout=60", *sys.argv[1:], str(corpus)]
        atheris.Setup(arguments, read, custom_mutator=_mutator(reader, _words(seeds)))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
