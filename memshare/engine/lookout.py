"""Now and then a look at all blocks: what each holds, and which requests have most of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from heapq import nlargest

import numpy as np

from memshare.config import ReportConfig
from memshare.engine.blocks import BlockBook
from memshare.engine.requests import RequestState
from memshare.engine.roster import Roster
from memshare.stats import RequestRow, Tally

_SHARE_OF_TIME = 0.001  # that looks may take of the engine's thread
# In rising order: a block that several entries point to counts as the highest.
_KINDS = ("free", "other", "recent", "prompt", "shared")


class Lookout:
    """Looks every ``report.every_s`` seconds, less often where a look takes long."""

    def __init__(
        self,
        config: ReportConfig,
        roster: Roster,
        book: BlockBook,
        tally: Tally,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._config = config
        self._roster = roster
        self._book = book
        self._tally = tally
        self._clock = clock
        self._next = clock()
        self._saw_requests = False

    def look(self) -> None:
        """Look if it is time, or if the last request has just gone: nothing may happen for long."""
        if not self._config.every_s:
            return
        began = self._clock()
        idle = next(iter(self._roster), None) is None
        if began < self._next and not (idle and self._saw_requests):
            return
        self._saw_requests = not idle
        self._tally.note_blocks(self._blocks(), self._requests())
        cost = self._clock() - began
        self._next = began + max(self._config.every_s, cost / _SHARE_OF_TIME)

    def _blocks(self) -> dict[str, int]:
        """Blocks by kind. They add up to all."""
        kinds = np.zeros(self._book.total + 1, np.int8)  # by block id; 0 is the null block
        for state in self._roster:
            table = self._book.table(state.request_id)
            if table is None:
                continue
            ids = np.fromiter((block.block_id for block in table), np.int64, len(table))
            own = np.ones(len(table), np.int8)
            own[self._roster.end_target(state) :] = 2
            own[: self._roster.first_target(state)] = 3
            own[[i for i in state.repointed if i < len(table)]] = 4
            np.maximum.at(kinds, ids, own)
        counts = dict(zip(_KINDS, np.bincount(kinds[1:], minlength=5).tolist(), strict=True))
        # Not seen above: blocks of requests that are not followed.
        counts["other"] += counts["free"] - self._book.free
        counts["free"] = self._book.free
        return counts

    def _requests(self) -> list[RequestRow]:
        return [
            RequestRow(
                request=state.request_id,
                tokens=state.request.num_tokens,
                blocks=blocks,
                prompt=min(self._roster.first_target(state), blocks),
                shared=len(state.repointed),
                preemptions=state.generation,
            )
            for state in nlargest(self._config.requests, self._roster, key=self._size)
            for blocks in (self._size(state),)
        ]

    def _size(self, state: RequestState) -> int:
        return len(self._book.table(state.request_id) or ())
