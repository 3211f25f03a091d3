"""A periodic census of all blocks: what each holds, and which requests hold most."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from heapq import nlargest
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from memshare.config import ReportConfig
from memshare.telemetry.stats import Counters, RequestRow

if TYPE_CHECKING:
    from memshare.core.interfaces import BlockTables
    from memshare.core.request_tracker import RequestTracker
    from memshare.core.requests import RequestState

_SHARE_OF_TIME = 0.001  # that looks may take of the engine's thread
_SLICE_S = 0.0005  # of a look in one engine step; what is left comes in the next ones
# In rising order: a block that several entries point to counts as the highest.
_KINDS = ("free", "other", "recent", "prompt", "shared")


class BlockCensus:
    """Looks every ``report.every_s`` seconds, less often where a look takes long.

    A look at many requests is spread over several engine steps, so that none is held up. What
    moves in between is seen half before and half after.
    """

    def __init__(
        self,
        config: ReportConfig,
        tracker: RequestTracker,
        tables: BlockTables,
        counters: Counters,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._config = config
        self._tracker = tracker
        self._tables = tables
        self._counters = counters
        self._clock = clock
        self._next = clock()
        self._look: Iterator[None] | None = None  # one that is under way
        self._cost = 0.0  # of it so far, seconds
        self._saw_requests = False

    def look(self) -> None:
        """Look if it is time, or if the last request has just gone: nothing may happen for long."""
        if not self._config.every_s:
            return
        began = self._clock()
        idle = next(iter(self._tracker), None) is None
        if idle and self._saw_requests:
            self._look, self._cost = self._survey(), 0.0
        elif self._look is None:
            if began < self._next:
                return
            self._look, self._cost = self._survey(), 0.0
        done = object()
        while next(self._look, done) is not done:
            if self._clock() - began > _SLICE_S:
                self._cost += self._clock() - began
                return
        self._look = None
        self._saw_requests = not idle
        self._cost += self._clock() - began
        self._next = began + max(self._config.every_s, self._cost / _SHARE_OF_TIME)

    def _survey(self) -> Iterator[None]:
        """One look; gives way after each request."""
        kinds = np.zeros(self._tables.total + 1, np.int8)  # by block id; 0 is the null block
        for state in list(self._tracker):
            table = self._tables.table(state.request_id)
            if table is None:
                continue
            ids = np.fromiter((block.block_id for block in table), np.int64, len(table))
            own = np.ones(len(table), np.int8)
            own[self._tracker.end_target(state) :] = 2
            own[: self._tracker.first_target(state)] = 3
            kinds[ids] = np.maximum(kinds[ids], own)
            kinds[ids[[i for i in state.repointed if i < len(table)]]] = 4
            yield
        self._counters.note_blocks(self._counts(kinds), self._requests())

    def _counts(self, kinds: npt.NDArray[np.int8]) -> dict[str, int]:
        """Blocks by kind. They add up to all."""
        counts = dict(zip(_KINDS, np.bincount(kinds[1:], minlength=5).tolist(), strict=True))
        # Blocks of requests that are not followed were not seen; others were freed since.
        unseen = counts["free"] - self._tables.free
        counts["free"] = self._tables.free
        for kind in ("other", "recent", "prompt", "shared"):
            taken = max(unseen, -counts[kind])
            counts[kind] += taken
            unseen -= taken
        return counts

    def _requests(self) -> list[RequestRow]:
        return [
            RequestRow(
                request=state.request_id,
                tokens=state.request.num_tokens,
                blocks=blocks,
                prompt=min(self._tracker.first_target(state), blocks),
                shared=len(state.repointed),
                dropped=len(state.holes),
                preemptions=state.generation,
            )
            for state in nlargest(self._config.requests, self._tracker, key=self._size)
            for blocks in (self._size(state),)
        ]

    def _size(self, state: RequestState) -> int:
        return len(self._tables.table(state.request_id) or ())
