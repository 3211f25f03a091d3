"""How loaded one replica is: measured in the replica, read by routers and by the autoscaler.

The unit is the replica itself. A load of 1 means that its requests want just what it has; at 2 they
want twice its KV cache, or twice the requests that its engine runs at once.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import NamedTuple

_PREEMPTION_WINDOW_S = 60.0


class Load(NamedTuple):
    """What a replica's engine does at one moment.

    Attributes:
        used: fraction of the KV blocks that requests hold, 0..1.
        running: requests in the running batch.
        waiting: requests in the engine that are not in it, preempted ones among them.
        slots: requests that the engine runs at once, at most.
        preemptions: in the last minute.
    """

    used: float
    running: float
    waiting: float
    slots: float
    preemptions: float

    @property
    def requests(self) -> float:
        """Requests in the engine."""
        return self.running + self.waiting

    @property
    def demand(self) -> float:
        """The replica's load: KV blocks or slots, whichever is scarcer.

        A waiting request is taken to want as many blocks as a running one holds.
        """
        blocks = self.used * self.requests / max(self.running, 1.0)
        return max(blocks, self.requests / self.slots)

    @property
    def waiting_share(self) -> float:
        """Fraction of the requests that wait, 0..1."""
        return self.waiting / self.requests if self.requests else 0.0


def to_stats(load: Load) -> dict[str, float]:
    """For Ray Serve, which carries flat dictionaries of numbers."""
    # Rounded, because Ray Serve broadcasts every change to every proxy.
    return {**load._asdict(), "used": round(load.used, 3)}


def from_stats(stats: Mapping[str, float]) -> Load | None:
    """The inverse; None if the replica has not reported yet."""
    return Load(**stats) if stats else None


class LoadMeter:
    """Keeps the latest load of one engine. Not thread-safe: for the replica's event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """``clock`` tells seconds."""
        self._clock = clock
        self._latest: Load | None = None
        self._preemptions: deque[tuple[float, int]] = deque()  # (when, how many), old ones first
        self._in_window = 0

    def record(self, used: float, running: int, waiting: int, slots: int) -> None:
        """Take the state after an engine step; see :class:`Load`."""
        self._latest = Load(used, running, waiting, slots, 0)

    def preempted(self, count: int) -> None:
        """``count`` requests lost their KV in this step."""
        if count:
            self._preemptions.append((self._clock(), count))
            self._in_window += count

    def read(self) -> Load | None:
        """The present load; None before the engine's first step."""
        horizon = self._clock() - _PREEMPTION_WINDOW_S
        while self._preemptions and self._preemptions[0][0] <= horizon:
            self._in_window -= self._preemptions.popleft()[1]
        if self._latest is None:
            return None
        return self._latest._replace(preemptions=self._in_window)
