"""How long a step's packings take, without waiting for a device."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Times what is done, or enqueued on a GPU, in a ``with`` block."""

    def __init__(self, device: torch.device) -> None:
        """Time work on ``device``."""
        self._on_gpu = device.type == "cuda"
        self._done: list[float] = []
        self._enqueued: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def running(self) -> Iterator[None]:
        """While this lasts, time passes."""
        if self._on_gpu:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._enqueued.append((start, end))
        else:
            begin = time.perf_counter()
            yield
            self._done.append(time.perf_counter() - begin)

    def take(self) -> list[float]:
        """Seconds of each block that has ended, on the device too, since the last call."""
        while self._enqueued and self._enqueued[0][1].query():
            start, end = self._enqueued.popleft()
            self._done.append(start.elapsed_time(end) / 1e3)
        done, self._done = self._done, []
        return done
