"""One live request as an on-demand policy sees it."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from memshare.core.interfaces import BlockTables
from memshare.core.request_tracker import RequestTracker
from memshare.core.requests import RequestState
from memshare.mechanisms.remap.pairs import Candidate, Entry


class Copies(Protocol):
    """What is known of where else a request's tokens appear, by block."""

    @property
    def coverage(self) -> npt.NDArray[np.float32]:
        """How much of each block appears elsewhere, 0..1."""
        ...

    @property
    def last_copies(self) -> npt.NDArray[np.bool_]:
        """Whether something that was given up elsewhere survives only there."""
        ...


class TableView:
    """The blocks of a request's table: a :class:`~memshare.mechanisms.remap.policy.RequestView`."""

    __slots__ = ("_blocks", "_copies", "_state", "budget", "end", "first", "full")

    def __init__(
        self,
        tracker: RequestTracker,
        tables: BlockTables,
        state: RequestState,
        copies: Copies | None = None,
    ) -> None:
        """Look at a request, which must hold blocks.

        Args:
            tracker: knows the request's limits.
            tables: hold its blocks.
            state: the request.
            copies: None if its tokens have not been compared.
        """
        table = tables.table(state.request_id)
        assert table is not None, "the caller has looked"
        self._blocks = table
        self._state = state
        self._copies = copies
        self.first = tracker.first_target(state)
        self.end = min(tracker.end_target(state), len(table))
        self.full = min(state.full, len(table))
        self.budget = tracker.budget(state)

    @property
    def has_budget(self) -> bool:
        """Whether another block of the request may be re-pointed."""
        return self._state.lost < self.budget and self.first < self.end

    @property
    def shared_fraction(self) -> float:
        """How much of the request is re-pointed."""
        return len(self._state.repointed) / self.full

    def is_target(self, index: int) -> bool:
        """See :meth:`RequestView.is_target`."""
        if not self.is_own(index) or not self.is_alone(index):
            return False
        return self._copies is None or not self._copies.last_copies[index]

    def is_own(self, index: int) -> bool:
        """See :meth:`RequestView.is_own`."""
        return index not in self._state.repointed and index not in self._state.holes

    def is_alone(self, index: int) -> bool:
        """Whether no other request's table holds the entry's block."""
        return self._state.holds_alone(self._blocks[index])

    def sharers(self, index: int) -> int:
        """See :meth:`RequestView.sharers`."""
        return int(self._blocks[index].ref_cnt) - 1

    @property
    def coverage(self) -> npt.NDArray[np.float32]:
        """See :attr:`RequestView.coverage`."""
        if self._copies is None:
            return np.zeros(self.full, np.float32)
        return self._copies.coverage[: self.full]

    @property
    def block_threshold(self) -> float | None:
        """See :attr:`RequestView.block_threshold`."""
        return self._state.options.memshare_block_threshold

    def candidate(self, target: int, donor: int) -> Candidate:
        """The pair that a policy's choice means."""
        state, blocks = self._state, self._blocks
        return Candidate(
            Entry(state, state.generation, target, blocks[target]),
            Entry(state, state.generation, donor, blocks[donor]),
        )
