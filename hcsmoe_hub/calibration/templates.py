"""Chat templates of a checkpoint, rendered in another process that is ended when it takes too much time or memory."""

import json
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from hcsmoe_hub.calibration import template_process
from hcsmoe_hub.calibration.conversations import Turn
from hcsmoe_hub.calibration.library_failures import RejectedError, rejection
from hcsmoe_hub.errors import CalibrationError

# What a template may take on top of what transformers needs to be imported.
MEMORY_BYTES = 512 * 1024**2
# CPU time for any conversation, and what every other one adds: templates take a millisecond.
SECONDS, SECONDS_EACH = 10.0, 0.1
_LOOK_SECONDS = 0.05
_FILES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
_HINT = "correct the chat template, delete it, or name a column of plain text with `text_column`"


class Templates(AbstractContextManager["Templates"]):
    """Renders conversations with the chat template of a tokenizer.

    The process is started for the first conversation, and serves all of them.

    Args:
        folder: Folder with the tokenizer files.
        seconds: CPU time that a single conversation may take.
        memory_bytes: Memory that the template may take.
    """

    def __init__(self, folder: Path, *, seconds: float = SECONDS, memory_bytes: int = MEMORY_BYTES) -> None:
        self._folder = folder
        self._seconds = seconds
        self._memory_bytes = memory_bytes
        self._worker: Worker | None = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._worker is not None:
            self._worker.close()

    def render(self, tokenizer: Any, turns: Sequence[Turn], tools: list[dict[str, Any]] | None) -> str:
        """The text that the chat template of a tokenizer makes of a conversation, as ``apply_chat_template`` does.

        Raises:
            RejectedError: If the template fails.
            CalibrationError: If it takes too much time or memory, or ends its process.
        """
        # One template of several is chosen, and null left out, as transformers does it.
        try:
            template = tokenizer.get_chat_template(None, tools)
            request = pickle.dumps(
                {
                    "template": template,
                    "turns": [{key: value for key, value in turn.items() if value is not None} for turn in turns],
                    "tools": tools,
                    "special_tokens": dict(tokenizer.special_tokens_map),
                }
            )
        except (ValueError, RecursionError) as error:
            raise rejection(error) from error
        if self._worker is None:
            self._worker = Worker(self._memory_bytes)
            self._worker.allow(self._seconds)
        answer = self._worker.ask(request)
        if isinstance(text := answer.get("text"), str):
            return text
        if "rejected" in answer:
            raise RejectedError(str(answer["rejected"]), hint=_HINT)
        raise CalibrationError(
            f"the chat template in {self._file(template)} {answer['excess']} for one conversation.", hint=_HINT
        )

    def _file(self, template: str) -> Path:
        """The file that holds a template: the first one that transformers looks for, unless another one is equal."""
        more = sorted((self._folder / "additional_chat_templates").glob("*.jinja"))
        same = (path for path in more if path.read_text(encoding="utf-8", errors="replace") == template)
        usual = (path for name in _FILES if (path := self._folder / name).is_file())
        return next(same, next(usual, self._folder))


class Worker:
    """The process, and a thread that looks at what it takes while an answer is awaited.

    Args:
        memory_bytes: Memory that a template may take.
    """

    def __init__(self, memory_bytes: int) -> None:
        # -P: files in the current folder must not shadow libraries.
        command = [sys.executable, "-P", "-m", template_process.__name__, str(memory_bytes)]
        # Libraries of numbers reserve memory for every thread.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        )
        self._excess = ""
        self._asked = 0
        self._is_asked = threading.Event()
        if self._receive() != template_process.READY:
            raise CalibrationError(
                f"the process that renders chat templates ends at once (exit code {self._process.wait()}).",
                hint="free some memory, or name a column of plain text with `text_column`",
            )
        # Where the system does not limit it already.
        self._memory_bytes = self._usage()[1] + memory_bytes
        self.allow(SECONDS)
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    @property
    def is_running(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    def allow(self, seconds: float) -> None:
        """Sets the CPU time that may be taken from now on, in addition to that of every conversation."""
        self._allowed, self._asked = seconds, 0
        self._last = self._usage()[0] + seconds

    def ask(self, request: bytes) -> dict[str, Any]:
        """The answer to a request; why there is none as ``excess``."""
        assert self._process.stdin is not None
        self._asked += 1
        self._is_asked.set()
        try:
            template_process.send(self._process.stdin, request)
            content = self._receive()
        except BrokenPipeError:
            content = None
        finally:
            self._is_asked.clear()
        if content is not None:
            answer: dict[str, Any] = json.loads(content)
            return answer
        code = self._process.wait()
        return {"excess": self._excess or f"ended the process that renders it (exit code {code})"}

    def _receive(self) -> bytes | None:
        assert self._process.stdout is not None
        return template_process.receive(self._process.stdout)

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        self._is_asked.set()
        self._watcher.join()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                # What could not be sent is not needed any more.
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue

    def _watch(self) -> None:
        """Ends the process when it takes too much: a template works, or is given memory, without coming back."""
        while self.is_running:
            self._is_asked.wait()
            self._excess = self._excess or self._look()
            if self._excess:
                self._process.kill()
                return
            time.sleep(_LOOK_SECONDS)

    def _look(self) -> str:
        """What the process takes too much of."""
        try:
            spent, memory = self._usage()
        except psutil.Error:
            return ""
        if spent > self._last + SECONDS_EACH * self._asked:
            return f"takes more than {self._allowed:g} seconds"
        return "needs too much memory" if memory > self._memory_bytes else ""

    def _usage(self) -> tuple[float, int]:
        """Seconds of CPU time, and resident bytes."""
        process = psutil.Process(self._process.pid)
        times = process.cpu_times()
        return times.user + times.system, int(process.memory_info().rss)
