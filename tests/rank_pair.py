"""Two processes that convert together, as a launcher would start them; they serve one conversion after the other."""

import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

# A machine that is busy with other tests takes long to import torch.
PATIENCE_SECONDS = 240
Job = tuple[str, Any]


def use_no_bfloat16() -> None:
    """Lets this process compute in float32 on every processor: in bfloat16, sums in another order change more."""
    import torch

    torch.cpu.get_capabilities = dict


def _serve(rank: int, store: Path, jobs: "Queue[Any]", answers: "Queue[Any]") -> None:
    """What each process does until it is given ``None``."""
    import torch
    import torch.distributed as dist

    from hcsmoe_hub import HcsmoeError, convert

    torch.set_num_threads(1)
    use_no_bfloat16()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    while (job := jobs.get()) is not None:
        (source, options), prepare = job
        events: list[Any] = []
        try:
            report = (prepare or convert)(source, options, listener=events.append)
            answers.put((rank, report, None))
        except HcsmoeError as error:
            answers.put((rank, None, (type(error).__name__, error.message, error.hint)))
    dist.destroy_process_group()


@dataclass(frozen=True, slots=True)
class Answer:
    """What a conversion ended with on one rank.

    Attributes:
        report: What it returned; ``None`` if it was refused.
        refusal: Class, message and hint of the error; ``None`` if it was not.
    """

    report: Any
    refusal: tuple[str, str, str] | None


class RankPair:
    """Two processes in a process group.

    Args:
        folder: Where they find each other.
    """

    def __init__(self, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._jobs = [context.Queue() for _ in range(2)]
        self._answers: Queue[Any] = context.Queue()
        self._processes = [
            context.Process(target=_serve, args=(rank, folder / "store", jobs, self._answers), daemon=True)
            for rank, jobs in enumerate(self._jobs)
        ]
        for process in self._processes:
            process.start()

    def convert(self, *jobs: Job, by: Callable[..., Any] | None = None) -> list[Answer]:
        """Converts on both ranks.

        Args:
            jobs: Source and options, or what else is called takes: one for both ranks, or one for each.
            by: What to call instead of ``convert``.

        Returns:
            What it ended with, by rank.
        """
        for place, queue in enumerate(self._jobs):
            queue.put((jobs[place % len(jobs)], by))
        found = sorted((self._answers.get(timeout=PATIENCE_SECONDS) for _ in self._jobs), key=lambda answer: answer[0])
        return [Answer(report, refusal) for _, report, refusal in found]

    def close(self) -> None:
        """Ends both."""
        for queue in self._jobs:
            queue.put(None)
        for process in self._processes:
            process.join(PATIENCE_SECONDS)
