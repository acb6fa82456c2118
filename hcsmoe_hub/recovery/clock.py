"""How long a recovery has trained, and how much of it is over."""

import time

from hcsmoe_hub.machine import ranks

WARM_UP = 0.05


class Clock:
    """Measures training in steps and in minutes, those of interrupted runs included.

    Args:
        max_steps: Steps to make; ``None`` for no limit.
        max_minutes: Minutes to train for; ``None`` for no limit.

    Attributes:
        max_steps: The same.
    """

    def __init__(self, max_steps: int | None, max_minutes: float | None) -> None:
        self.max_steps = max_steps
        self._limit = None if max_minutes is None else 60 * max_minutes
        self._earlier, self._start = 0.0, time.monotonic()
        self._seen = 0.0

    @property
    def seconds(self) -> float:
        """Time so far."""
        return self._earlier + time.monotonic() - self._start

    def go_on(self, seconds: float) -> None:
        """Counts the time of an interrupted run as well, and begins that of this one."""
        self._earlier, self._start = seconds, time.monotonic()
        self.look()

    def look(self) -> None:
        """Reads the time, once per step: all ranks must see the same."""
        if self._limit is not None:
            self._seen = ranks.from_first(self.seconds)

    @property
    def is_over(self) -> bool:
        """Whether the time is over."""
        return self._limit is not None and self._seen >= self._limit

    def share(self, steps: int) -> float:
        """Share of the training that is over after so many steps, from 0 to 1: by steps or by time, whichever is more.

        Args:
            steps: Steps so far.
        """
        by_steps = 0.0 if self.max_steps is None else steps / self.max_steps
        by_time = 0.0 if self._limit is None else self._seen / self._limit
        return min(1.0, max(by_steps, by_time))

    def schedule(self, steps: int) -> float:
        """Share of the largest step that the next one has: a short linear rise, then a linear fall to nearly 0.

        Args:
            steps: Steps before it.
        """
        share, least = self.share(steps), 1e-3
        if share < WARM_UP:
            # The first step of all is a small one, too.
            share = max(share, 0.5 / (self.max_steps or 1000))
            return max(least, share / WARM_UP)
        return max(least, (1 - share) / (1 - WARM_UP))
