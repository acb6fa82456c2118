"""All hostile inputs, and a program that converts from each of them: ``python hostile_inputs.py [--part 0/8] [WORDS]``.

One line per input with the exit code, the peak of memory and what was printed; exit code 1 if one of them was not
refused cleanly.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

# Imported here, so that the processes that are forked have them.
import datasets  # noqa: F401
import numpy as np
import torch
from tiny_models import build

import hcsmoe_hub.cli.app
import hcsmoe_hub.convert
import hcsmoe_hub.evaluation.evaluate
import hcsmoe_hub.model_cards
import hcsmoe_hub.pipeline.run
import hcsmoe_hub.planning.make  # noqa: F401
from hostile import hostile_configs, hostile_headers, hostile_results
from hostile.hostile_run import run

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "tiny-mixtral"
CONVERT = ("convert", "model", "--experts", "4", "--preset", "hc-smoe", "--device", "cpu", "--quiet", "--output", "out")
IDS = ("--calibration", "ids.npy")
SHORT = ("--sequence-length", "16", "--samples", "2")
TURNS = [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "hello to you"}]


@dataclass(frozen=True, slots=True)
class Hostile:
    """One input.

    Attributes:
        name: What is wrong with it.
        prepare: Makes it so, in a folder that holds a sound ``model`` and ``ids.npy``.
        words: The command.
    """

    name: str
    prepare: Callable[[Path], None]
    words: tuple[str, ...]


def all_inputs() -> Iterator[Hostile]:
    """Every input, in a fixed order."""
    for groups in (hostile_headers.headers, hostile_headers.indexes, hostile_configs.configs):
        for name, damage in groups():
            yield Hostile(name, _in_model(damage), (*CONVERT, *IDS))
    for name, damage in hostile_configs.tokenizers():
        yield Hostile(name, _in_model(damage), CONVERT)
    for name, damage in hostile_configs.templates():
        yield Hostile(name, _with_chats(damage), (*CONVERT, "--calibration", "chats.jsonl", *SHORT))
    for name, (file, content) in hostile_configs.TEXTS.items():
        words = (*CONVERT, "--calibration", file, *SHORT)
        yield Hostile(f"text: {name}", _put(file, lambda content=content: content), words)
    for name, (file, make) in hostile_configs.LONG_TEXTS.items():
        yield Hostile(f"text: {name}", _put(file, make), (*CONVERT, "--calibration", file, *SHORT))
    for name, damage, words in hostile_results.results():
        yield Hostile(name, _in_model(damage), words)
    for name, make in hostile_configs.STATISTICS.items():
        yield Hostile(f"statistics: {name}", _put("a.stats", make), (*CONVERT, "--statistics", "a.stats"))


def _in_model(damage: hostile_headers.Damage) -> Callable[[Path], None]:
    return lambda folder: damage(folder / "model")


def _with_chats(damage: hostile_headers.Damage) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        damage(folder / "model")
        (folder / "chats.jsonl").write_text((json.dumps({"messages": TURNS}) + "\n") * 20)

    return prepare


def _put(name: str, make: Callable[[], bytes]) -> Callable[[Path], None]:
    return lambda folder: _write(folder / name, make())


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def sound_model(folder: Path) -> None:
    """A tiny Mixtral with a tokenizer, and token ids to calibrate on."""
    model = build(folder / "model", "mixtral", max_shard_size="1GB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXAMPLE / name, model)
    (folder / hostile_results.TEXT).write_bytes(hostile_configs.LINE * 20)
    np.save(folder / "ids.npy", np.random.default_rng(0).integers(0, 64, (4, 16)))


def main() -> None:
    """Runs them, or a part of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="only inputs whose names have one of these words")
    parser.add_argument("--part", default="0/1", help="every n-th input from some place on, such as 0/8")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    first, every = map(int, arguments.part.split("/"))
    chosen = [
        each for each in all_inputs() if not arguments.words or any(word in each.name for word in arguments.words)
    ]
    failures = 0
    with tempfile.TemporaryDirectory() as place:
        sound_model(Path(place) / "sound")
        for hostile in chosen[first::every]:
            folder = Path(place) / "case"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(Path(place) / "sound", folder)
            hostile.prepare(folder)
            outcome = run(folder, list(hostile.words))
            failures += not outcome.is_clean
            print(json.dumps({"name": hostile.name, "clean": outcome.is_clean, **asdict(outcome)}), flush=True)
    raise SystemExit(1 if failures else 0)


if __name__ == "__main__":
    main()
