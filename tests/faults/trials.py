"""Conversions of a tiny sharded model on a disk that fails, and what must be true after each."""

import errno
import json
import os
import re
import resource
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from faults import disk
from faults.child import Run, here, run, start
from faults.disk import NO_FAULT, Fault, How
from tiny_models import build, contents, options
from transformers import AutoModelForCausalLM

from hcsmoe_hub.checkpoint.unfinished import UNFINISHED
from hcsmoe_hub.errors import HcsmoeError
from hcsmoe_hub.result.verify import check_structure

COMMON = ("--experts", "4", "--max-shard-size", "20KB", "--device", "cpu", "--quiet")
# Options of each way to convert; ``overwrite`` replaces an older result of another size.
VARIANTS: Mapping[str, tuple[str, ...]] = {
    "plain": ("--preset", "hc-smoe"),
    "overwrite": ("--preset", "hc-smoe", "--overwrite"),
    "statistics": ("--preset", "hc-smoe", "--statistics", "STATISTICS"),
    "mapped": ("--preset", "hc-smoe", "--layout", "mapped", "--figure"),
    "width": ("--expert-width", "16"),
    "model": ("--refit", "model"),
}
# Other files that a user keeps in the folder of a result.
OWN = {"notes.txt": b"mine\n", "mine/model.safetensors": b"mine too\n"}
# What a report and a card say of the run itself.
PASSING = ("timings_seconds", "peak_memory_bytes")
PASSING_LINES = re.compile(r"^(- \*\*Run\*\*:|<!-- hcsmoe:card ).*$", re.MULTILINE)
MOST_LINES = 4
# A user without rights, on every Linux.
NOBODY = 65534


class Trials:
    """Conversions in folders of their own.

    Args:
        folder: Where everything lies.
    """

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)
        self._folder = folder.resolve()
        # Another user has to reach what lies in there.
        self._folder.chmod(0o755)
        self.home = self._folder / "home"
        self.home.mkdir()
        os.environ["HCSMOE_HOME"] = str(self.home)
        self.temporary = self._folder / "temporary"
        self.temporary.mkdir()
        self._source = build(self._folder / "model", max_shard_size="40KB")
        for file in self._source.iterdir():
            file.chmod(0o644)
        (self._source / "tokenizer_note.md").write_text("a file of the source\n")
        self._ids = Path(str(options(self._source, 4).calibration.dataset))
        self.output = self._folder / "result"
        self.statistics = self._folder / "saved" / "statistics"
        self._expected: dict[str, dict[str, bytes]] = {}

    # What conversions are made of

    def arguments(self, variant: str) -> list[str]:
        """The command of a variant."""
        given = [str(self.statistics) if word == "STATISTICS" else word for word in VARIANTS[variant]]
        paths = ["convert", str(self._source), "--output", str(self.output), "--calibration", str(self._ids)]
        return [*paths, *COMMON, *given]

    def _convert(self, variant: str, fault: Fault = NO_FAULT) -> Run:
        """Runs a variant in a child, on a disk that fails."""
        folders = [self.output, self.statistics.parent]
        disk.arm([], NO_FAULT)
        done = run(self.arguments(variant), self._folder, partial(disk.arm, folders, fault))
        disk.arm([], NO_FAULT)
        return done

    def _prepare(self, variant: str) -> None:
        """Gives a variant the folder that it starts from."""
        shutil.rmtree(self.output, ignore_errors=True)
        shutil.rmtree(self.statistics.parent, ignore_errors=True)
        if variant == "overwrite":
            shutil.copytree(self._older, self.output)

    @cached_property
    def _older(self) -> Path:
        """A complete result of another size, with files that the user has put there."""
        older, wanted = self._folder / "older", self.output
        shutil.rmtree(self.output, ignore_errors=True)
        arguments = self.arguments("plain")
        arguments[arguments.index("--experts") + 1] = "6"
        here(arguments)
        for name, content in OWN.items():
            (wanted / name).parent.mkdir(exist_ok=True)
            (wanted / name).write_bytes(content)
        wanted.rename(older)
        return older

    def _found(self) -> dict[str, bytes]:
        """Every file of the output folder and the statistics, without what differs between two runs."""
        found = {}
        for folder in (self.output, self.statistics.parent):
            found |= {f"{folder.name}/{name}": content for name, content in contents(folder).items()}
        return {name: _lasting(name, content) for name, content in found.items()}

    def expected(self, variant: str) -> dict[str, bytes]:
        """What an undisturbed run of a variant leaves.

        It runs in this process, so that children find everything imported and the rates of the machine measured.
        """
        if variant not in self._expected:
            self._prepare(variant)
            here(self.arguments(variant))
            self._expected[variant] = self._found()
        return self._expected[variant]

    # What is asked

    def calls(self, variant: str) -> int:
        """How many calls an undisturbed run of a variant makes."""
        self.expected(variant)
        self._prepare(variant)
        return self._convert(variant).calls

    def fail(self, variant: str, at: int, error: str, how: int) -> dict[str, str]:
        """Lets one call of a conversion fail, then runs the same command again.

        Args:
            variant: What to convert.
            at: Number of the call.
            error: Name of the errno; empty for none.
            how: Flags of ``How``.

        Returns:
            ``call`` that failed, ``end``, and ``wrong``: what must not be, empty if nothing is.
        """
        expected = self.expected(variant)
        self._prepare(variant)
        before = self._found()
        first = self._convert(variant, Fault(at, getattr(errno, error) if error else 0, How(how)))
        wrong = self._judge(first, before, expected, killed=bool(how & How.ENDS))
        is_done = not _differences(_outside(self._found()), expected)
        if first.code:
            again = self._convert(variant)
            # The disk may have failed when the result was in its place already.
            if again.code and not (is_done and "is not empty" in again.text):
                wrong.append(f"the next run fails: {again.text.strip()}")
            found = _outside(self._found()) if is_done else self._found()
            wrong += [f"after the next run, {name}" for name in _differences(found, expected)]
        call = first.failed.replace(str(self._folder), "")
        lines = first.text.strip().splitlines()
        end = f"{first.code}: {lines[0].replace(str(self._folder), '') if lines else ''}"
        return {"call": call, "end": end, "wrong": "; ".join(wrong)}

    # What else may happen to a disk

    def fill(self, place: str, variant: str) -> dict[str, Any]:
        """Converts while another disk than that of the result is full.

        Args:
            place: ``home`` (measured rates), ``temporary`` or ``statistics``.
            variant: What to convert.

        Returns:
            ``code``, ``text``, ``calls`` to that disk, and ``differences`` from an undisturbed run.
        """
        self.expected(variant)
        self._prepare(variant)
        folder = {"home": self.home, "temporary": self.temporary, "statistics": self.statistics.parent}[place]

        def prepare() -> None:
            tempfile.tempdir = str(self.temporary)
            disk.arm([folder], Fault(1, errno.ENOSPC, How.KEEPS))

        return self._told(variant, prepare)

    def limit(self, variant: str, size: int) -> dict[str, Any]:
        """Converts where no file may be larger than ``size`` bytes; returns what ``fill`` returns."""
        self.expected(variant)
        self._prepare(variant)
        return self._told(variant, partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size)))

    def forbid(self, place: str, variant: str) -> dict[str, Any]:
        """Converts as a user who may not write to ``output``, ``statistics``, ``source`` or ``home``."""
        self.expected(variant)
        self._prepare(variant)
        within = self._folder / "nobody"
        shutil.rmtree(within, ignore_errors=True)
        within.mkdir()
        places = {"output": self.output, "statistics": self.statistics}
        folder = {"source": self._source, "home": self.home}.get(place, within)
        arguments = self.arguments(variant)
        for name, path in places.items():
            allowed = within / name if place == name else self._folder / "free" / name
            arguments = [str(allowed) if word == str(path) else word for word in arguments]
        free = self._folder / "free"
        shutil.rmtree(free, ignore_errors=True)
        free.mkdir()
        free.chmod(0o777)
        before = contents(folder)
        modes = {path: path.stat().st_mode for path in (folder, *folder.rglob("*"))}
        for path in modes:
            path.chmod(modes[path] & 0o555)
        try:
            done = run(arguments, self._folder, _become_nobody)
        finally:
            for path, mode in modes.items():
                path.chmod(mode)
        changed = _differences(contents(folder), before)
        return {"code": done.code, "text": done.text, "changed": changed, "made": sorted(contents(free))}

    def jump(self, variant: str, after: int, seconds: int) -> dict[str, Any]:
        """Converts while the clock of the day jumps; returns what ``fill`` returns."""
        self.expected(variant)
        self._prepare(variant)
        return self._told(variant, partial(disk.let_clock_jump, after, seconds))

    def meet(self, variant: str, at: int) -> dict[str, Any]:
        """Lets a second conversion to the same folder begin while the first has stopped at its ``at``-th call.

        Returns:
            ``second``: how it ended; and of the first what ``fill`` returns.
        """
        expected = self.expected(variant)
        self._prepare(variant)
        fault = Fault(at, 0, How.STOPS)
        first = start(self.arguments(variant), self._folder, partial(disk.arm, [self.output], fault))
        if not first.wait_until_stopped():
            raise RuntimeError(f"a conversion makes fewer than {at} calls")
        second = run(self.arguments(variant), self._folder)
        first.go_on()
        done = first.wait()
        return {"second": {"code": second.code, "text": second.text}, **self._told_of(done, expected)}

    def changes(self, variant: str) -> list[str]:
        """Whatever a conversion changes outside its output folder and statistics file: call and path.

        Args:
            variant: What to convert.
        """
        self.expected(variant)
        self._prepare(variant)
        file = self._folder / "changes.txt"
        file.unlink(missing_ok=True)

        def prepare() -> None:
            tempfile.tempdir = str(self.temporary)
            disk.list_changes(file)

        done = run(self.arguments(variant), self._folder, prepare)
        if done.code:
            raise RuntimeError(done.text)
        inside = (self.output, self.statistics.parent, self.home, self.temporary)
        found = [line.split(" ", 1) for line in file.read_text("utf-8").splitlines()]
        outside = [(call, path) for call, path in found if not any(map(Path(path).is_relative_to, inside))]
        return sorted({f"{call} {path}" for call, path in outside})

    def _told(self, variant: str, prepare: Callable[[], None]) -> dict[str, Any]:
        """Runs a variant in a child; returns what ``fill`` returns."""
        disk.arm([], NO_FAULT)
        done = run(self.arguments(variant), self._folder, prepare)
        return self._told_of(done, self.expected(variant))

    def _told_of(self, done: Run, expected: Mapping[str, bytes]) -> dict[str, Any]:
        differences = _differences(self._found(), expected)
        text = done.text.replace(str(self._folder), "")
        return {"code": done.code, "text": text, "calls": done.calls, "differences": differences}

    def _judge(
        self, done: Run, before: Mapping[str, bytes], expected: Mapping[str, bytes], *, killed: bool
    ) -> list[str]:
        """What is wrong after a conversion whose disk has failed."""
        wrong = []
        found = self._found()
        own = {name: content for name, content in found.items() if name.removeprefix(f"{self.output.name}/") in OWN}
        if before and len(own) < len(OWN):
            wrong.append("files of the user are gone")
        if done.code == 0:
            return wrong + _differences(found, expected)
        if done.code not in ((137,) if killed else (1,)):
            wrong.append(f"it ended with {done.code}")
        if "Traceback" in done.text or (not killed and done.text.count("Error: ") != 1):
            wrong.append(f"not one message: {done.text.strip()[-600:]}")
        if len(done.text.strip().splitlines()) > MOST_LINES:
            wrong.append(f"too long a message: {done.text.strip()[-600:]}")
        kind = "verify" if self._passes() else "from_pretrained" if self._loads() else ""
        top = _outside(found)
        if kind and _differences(top, expected) and (not before or _differences(top, before)):
            wrong.append(f"{kind} takes the folder for complete: {sorted(found)}")
        return wrong

    def _passes(self) -> bool:
        """Whether the first check of ``hcsmoe verify`` accepts the output folder."""
        try:
            check_structure(self.output)
        except HcsmoeError:
            return False
        return True

    def _loads(self) -> bool:
        """Whether transformers loads the output folder."""
        try:
            AutoModelForCausalLM.from_pretrained(self.output, local_files_only=True)
        # Whatever it raises, it does not load it.
        except (OSError, ValueError, KeyError, RuntimeError):
            return False
        return True


def _lasting(name: str, content: bytes) -> bytes:
    """A file without what two runs of the same command differ in."""
    match Path(name).name:
        case "hcsmoe.json":
            report = json.loads(content)
            return json.dumps({key: value for key, value in report.items() if key not in PASSING}).encode()
        case "README.md":
            return PASSING_LINES.sub("", content.decode()).encode()
        case _:
            return content


def _outside(found: Mapping[str, bytes]) -> dict[str, bytes]:
    """Files that are not part of an unfinished conversion."""
    return {name: content for name, content in found.items() if UNFINISHED not in name}


def _become_nobody() -> None:
    """Gives up the rights of root, if this process has them."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)


def _differences(found: Mapping[str, bytes], expected: Mapping[str, bytes]) -> list[str]:
    """Files that differ, in words."""
    missing = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    extra = [f"{name} is left over" for name in sorted(found.keys() - expected.keys())]
    common = sorted(expected.keys() & found.keys())
    return [*missing, *extra, *(f"{name} differs" for name in common if found[name] != expected[name])]
