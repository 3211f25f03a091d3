"""The reclaim queue: verified pairs by expected damage, at most one per target."""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from typing import Generic, NamedTuple, Protocol, TypeVar


class Queued(Protocol):
    """What the queue needs to know of a pair."""

    @property
    def damage(self) -> float:
        """Expected damage; lower goes first."""
        ...

    @property
    def target_key(self) -> Hashable:
        """What identifies the target: a better pair for it replaces a worse one."""
        ...


Pair = TypeVar("Pair", bound=Queued)


class _Entry(NamedTuple):
    damage: float
    order: int  # first come, first served among equals; keeps the heap from comparing pairs
    key: Hashable


class ReclaimQueue(Generic[Pair]):
    """A heap with lazy deletion. Every operation is O(log n), amortised."""

    def __init__(self) -> None:
        self._heap: list[_Entry] = []
        self._pairs: dict[Hashable, tuple[int, Pair]] = {}
        self._order = 0

    def __len__(self) -> int:
        return len(self._pairs)

    def __contains__(self, key: Hashable) -> bool:
        """Whether a pair for this target waits."""
        return key in self._pairs

    def push(self, pair: Pair) -> Pair | None:
        """Add a pair; returns the pair for the same target that had to give way, if any.

        The pair with less damage stays, the earlier one among equals.
        """
        key = pair.target_key
        held = self._pairs.get(key)
        if held is not None and held[1].damage <= pair.damage:
            return pair
        self._order += 1
        self._pairs[key] = (self._order, pair)
        heapq.heappush(self._heap, _Entry(pair.damage, self._order, key))
        return None if held is None else held[1]

    def pop(self) -> Pair | None:
        """Take the pair with the least damage; None if the queue is empty."""
        while self._heap:
            entry = heapq.heappop(self._heap)
            held = self._pairs.get(entry.key)
            if held is not None and held[0] == entry.order:
                del self._pairs[entry.key]
                return held[1]
        return None

    def discard(self, key: Hashable) -> Pair | None:
        """Remove the pair for a target; returns it, or None if there was none."""
        held = self._pairs.pop(key, None)
        if len(self._heap) > 64 and len(self._heap) > 2 * len(self._pairs):
            self._heap = [e for e in self._heap if self._is_held(e)]
            heapq.heapify(self._heap)
        return None if held is None else held[1]

    def _is_held(self, entry: _Entry) -> bool:
        held = self._pairs.get(entry.key)
        return held is not None and held[0] == entry.order
