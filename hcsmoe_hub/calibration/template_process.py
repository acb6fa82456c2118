"""Renders chat templates in a process of its own, which ``templates.py`` starts and watches.

Run as ``python -m hcsmoe_hub.calibration.template_process MEMORY_BYTES``. A template is a program of somebody else, in
the sandbox of transformers: that keeps it from the interpreter, but not from working without end or taking all memory.
Requests come from standard input, answers go to standard output, each after its length in eight bytes.
"""

import json
import pickle
import sys
import time
from contextlib import suppress
from typing import IO, Any

import psutil

from hcsmoe_hub.calibration.library_failures import LibraryFailures, RejectedError, rejection

# Longer than any conversation; tokens of a text take many times its memory.
LONGEST = 16_000_000
LENGTH_BYTES = 8
# More than the parent allows.
CPU_SECONDS = 30
# Sent once everything is imported, so that only templates are measured.
READY = b"ready"


def send(stream: IO[bytes], content: bytes) -> None:
    """Writes one message."""
    stream.write(len(content).to_bytes(LENGTH_BYTES, "little") + content)
    stream.flush()


def receive(stream: IO[bytes]) -> bytes | None:
    """The next message; ``None`` when the other side has gone."""
    length = stream.read(LENGTH_BYTES)
    content = stream.read(int.from_bytes(length, "little"))
    return content if len(length) == LENGTH_BYTES and len(content) == int.from_bytes(length, "little") else None


def _limit_memory(most: int) -> None:
    """Lets this process take only so many bytes more, where the system can; the parent watches in any case."""
    import resource

    used = int(psutil.Process().memory_info().vms)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (used + most, used + most))
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _limit_time() -> None:
    """Ends this process if a conversation takes far too long: the parent, which watches, may have been killed."""
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + CPU_SECONDS, most))


def _render(request: dict[str, Any]) -> dict[str, str]:
    """What a template makes of a conversation: ``text``, or why there is none: ``rejected`` or ``excess``."""
    try:
        text = _rendered(request)
    except MemoryError:
        return {"excess": "needs too much memory"}
    except RejectedError as error:
        return {"rejected": error.message}
    return {"text": text} if len(text) <= LONGEST else {"excess": f"makes {len(text)} characters"}


def _rendered(request: dict[str, Any]) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    short = ""
    with LibraryFailures(rejection):
        try:
            rendered: Any = render_jinja_template(
                conversations=[request["turns"]],
                tools=request["tools"],
                chat_template=request["template"],
                **request["special_tokens"],
            )
            return str(rendered[0][0])
        except MemoryError as error:
            short = str(error) or "no memory"
    raise MemoryError(short)


def main() -> None:
    """Entry point: answers requests until standard input ends."""
    from transformers.utils import chat_template_utils  # noqa: F401

    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    # Nothing else may be written between the answers.
    sys.stdout = sys.stderr
    _limit_memory(int(sys.argv[1]))
    send(answers, READY)
    while (request := receive(requests)) is not None:
        _limit_time()
        # The request comes from this package itself; the answer is read as JSON, whatever a template has done here.
        send(answers, json.dumps(_render(pickle.loads(request))).encode())


if __name__ == "__main__":
    main()
