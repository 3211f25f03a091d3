"""A timing wheel, so that requests without news cost nothing in a step."""

from __future__ import annotations

from typing import Generic, TypeVar

Item = TypeVar("Item")


class TimingWheel(Generic[Item]):
    """Items to look at again after a number of ticks. O(1) a tick plus O(1) an item due."""

    def __init__(self) -> None:
        self._now = 0
        self._due: dict[int, list[Item]] = {}

    def schedule(self, item: Item, ticks: int) -> None:
        """Let ``item`` come up ``ticks`` >= 1 ticks from now."""
        self._due.setdefault(self._now + ticks, []).append(item)

    def advance(self) -> list[Item]:
        """Move on one tick; returns what has come up."""
        self._now += 1
        return self._due.pop(self._now, [])

    def due_within(self, ticks: int) -> int:
        """How many items come up in the next ``ticks`` ticks."""
        count = 0  # a loop: in every engine step, where a generator takes twice as long
        for tick in range(self._now + 1, self._now + ticks + 1):
            count += len(self._due.get(tick, ()))
        return count
