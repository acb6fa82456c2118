"""Faults between a client and the loopback Hub."""

import random
import re
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from enum import Enum, auto


class Fault(Enum):
    """A fault of one request."""

    # Errors without any effect, with the shortest possible Retry-After.
    TOO_MANY_REQUESTS = auto()
    SERVER_ERROR = auto()
    UNAVAILABLE = auto()
    # A proxy's error page: not JSON.
    BAD_GATEWAY = auto()
    # The connection ends when half of the request's body has arrived.
    CUT_REQUEST = auto()
    # The request takes effect, then the connection ends without an answer.
    LOST_ANSWER = auto()
    # The request takes effect, then the connection ends in the middle of the answer's body.
    CUT_ANSWER = auto()
    # Both bodies come in small pieces.
    SLOW = auto()
    # Half of the request's body arrives, then the server waits until the test releases it; then the connection ends.
    HELD = auto()


# Faults that end by themselves.
PASSING = tuple(fault for fault in Fault if fault is not Fault.HELD)


# Chooses the fault of a request, given its method and its path; usually none.
Plan = Callable[[str, str], Fault | None]


def no_faults(method: str, path: str) -> None:
    """The plan of a server without faults."""


class RandomFaults:
    """Faults at random moments, the same ones for the same seed.

    The fault of a request depends on the seed, the request, and how often it was made before, but not on what
    other connections do at the time.

    Args:
        seed: Seed of the random choices.
        rate: Share of requests with a fault.
        kinds: Possible faults.
        most: Maximum faults per request; a client that retries often enough succeeds.
        where: Only paths that match this pattern.
    """

    def __init__(
        self, seed: int, *, rate: float, kinds: Sequence[Fault] = PASSING, most: int = 2, where: str = ".*"
    ) -> None:
        self._seed = seed
        self._rate = rate
        self._kinds = tuple(kinds)
        self._most = most
        self._where = re.compile(where)
        self._seen: Counter[tuple[str, str]] = Counter()
        self._done: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()

    def count(self) -> int:
        """Number of requests with a fault."""
        return self._done.total()

    def __call__(self, method: str, path: str) -> Fault | None:
        if not self._where.search(path):
            return None
        with self._lock:
            request = (method, path)
            self._seen[request] += 1
            chance = random.Random(f"{self._seed} {method} {path} {self._seen[request]}")
            if chance.random() >= self._rate or self._done[request] == self._most:
                return None
            self._done[request] += 1
            return chance.choice(self._kinds)


class ListedFaults:
    """Faults that are listed one by one; each happens once, to the first request that matches.

    Args:
        listed: Method, pattern of the path, and fault.
    """

    def __init__(self, *listed: tuple[str, str, Fault]) -> None:
        self.left = list(listed)
        self._lock = threading.Lock()

    def __call__(self, method: str, path: str) -> Fault | None:
        with self._lock:
            for entry in self.left:
                if entry[0] == method and re.search(entry[1], path):
                    self.left.remove(entry)
                    return entry[2]
        return None
