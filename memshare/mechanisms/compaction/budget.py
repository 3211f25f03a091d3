"""What a request may still lose, and which requests lose how much in a round."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from memshare.core.interfaces import BlockTables
from memshare.core.request_tracker import RequestTracker
from memshare.core.requests import RequestState


@dataclass(frozen=True, slots=True)
class Room:
    """What a request may lose now.

    Attributes:
        state: the request.
        entries: that may be packed: full, committed, behind the protected prompt and before the
            recent window, no holes, and in no other request's table; ascending.
        budget: how many holes the request may have in all.
    """

    state: RequestState
    entries: tuple[int, ...]
    budget: int

    @property
    def may_go(self) -> int:
        """Entries that may go, those included that have gone."""
        return len(self.entries) + len(self.state.holes)

    @property
    def left(self) -> int:
        """How many of the entries may still become holes."""
        return self.budget - len(self.state.holes)


class Budgets:
    """Measures requests against the limits of the configuration, and their own."""

    def __init__(self, tracker: RequestTracker, tables: BlockTables, max_thinning: float) -> None:
        self._max_thinning = max_thinning
        self._tracker = tracker
        self._tables = tables

    def most_left(self, state: RequestState) -> int:
        """At most this many entries may still become holes. Cheap: looks at no block."""
        return self._tracker.shareable(state, state.full) - len(state.holes)

    def share(self, state: RequestState) -> float:
        """How much of what may go has gone, 0..1; as cheap."""
        may_go = self._tracker.end_target(state) - self._tracker.first_target(state)
        return len(state.holes) / max(may_go, 1)

    def room(self, state: RequestState) -> Room:
        """What the request, which must hold blocks, may lose now."""
        table = self._tables.table(state.request_id)
        assert table is not None, "the caller has looked"
        # The last entry stays, whatever the recent window: lengths are counted back from it.
        end = min(self._tracker.end_target(state), len(table) - 1)
        entries = tuple(
            entry
            for entry in range(self._tracker.first_target(state), end)
            if entry not in state.holes and state.holds_alone(table[entry])
        )
        # Blocks that others share may not go either: dropping them would free nothing.
        may_go = len(entries) + len(state.holes)
        by_share = min(self._tracker.budget(state), int(self._max_thinning * may_go))
        excess = self._tracker.excess(state, state.full)
        return Room(state, entries, max(by_share, min(excess, may_go)))

    def excess(self, state: RequestState) -> int:
        """How many more entries must become holes for the request to keep within its tokens."""
        return self._tracker.excess(state, state.full) - len(state.holes)

    def trim(self, room: Room, least: int) -> Round | None:
        """The round that brings a request back within its tokens; None if nothing may go.

        Args:
            room: of a request with an excess.
            least: blocks that a round frees if it may: rounds are large, few.
        """
        state = room.state
        allowed = self._tracker.most_lost(state, state.full) - len(state.holes)
        blocks = min(max(self.excess(state), least), allowed, len(room.entries))
        return Round(room, blocks) if blocks > 0 else None


@dataclass(frozen=True, slots=True)
class Round:
    """A request is to lose so many blocks."""

    room: Room
    blocks: int


def plan_rounds(
    ready: Iterable[tuple[float, RequestState]],
    look: Callable[[RequestState], Room | None],
    wanted: int,
    fraction: float,
    least: int,
) -> Iterator[Round]:
    """Choose what costs least: all requests lose as large a share before one loses more.

    The last tokens that are dropped cost most, so equal shares cost less than the same number
    unequally divided. Among equals long requests go first: one round frees more. Each request
    appears once, with all that it loses.

    Args:
        ready: requests that may have room, each with its place in the order, as a rule the share
            that it has lost already.
        look: what a request may lose now, exactly; None if nothing. Called for those only whose
            turn comes.
        wanted: blocks. The last round may free more than is left of them: rounds are large, few.
        fraction: of what may go, that a request loses before the others have their turn.
        least: blocks; who cannot lose as many, loses none.
    """
    heap = [(place, -state.full, order, state) for order, (place, state) in enumerate(ready)]
    heapq.heapify(heap)
    seen: dict[int, Room] = {}
    chosen: dict[int, int] = {}
    while heap and wanted > 0:
        _, longest_first, order, state = heapq.heappop(heap)
        if order not in seen:
            room = look(state)
            if room is None:
                continue
            seen[order] = room
        room, already = seen[order], chosen.get(order, 0)
        left = room.left - already
        if left < least:
            continue
        blocks = min(left, max(least, math.ceil(fraction * room.may_go)))
        chosen[order] = already + blocks
        wanted -= blocks
        share = (len(state.holes) + chosen[order]) / room.may_go
        heapq.heappush(heap, (share, longest_first, order, state))
    for order, blocks in chosen.items():
        yield Round(seen[order], blocks)
