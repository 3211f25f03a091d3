"""The reclaim queue against a plain list."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from memshare.core.reclaim_queue import ReclaimQueue


@dataclass(frozen=True, eq=False)  # pairs are told apart by identity, as real ones are
class Pair:
    target_key: Hashable
    damage: float


KEYS = st.integers(0, 6)
DAMAGES = st.sampled_from([0.0, 0.1, 0.2, 0.3]) | st.floats(-1.0, 2.0)


class AgainstAList(RuleBasedStateMachine):
    """``held`` is kept in order of arrival, so the first of the least is the one to pop."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: ReclaimQueue[Pair] = ReclaimQueue()
        self.held: list[Pair] = []

    def of(self, key: int) -> Pair | None:
        return next((p for p in self.held if p.target_key == key), None)

    @rule(key=KEYS, damage=DAMAGES)
    def push(self, key: int, damage: float) -> None:
        pair, old = Pair(key, damage), self.of(key)
        if old is not None and old.damage <= damage:
            assert self.queue.push(pair) is pair
            return
        assert self.queue.push(pair) is old
        if old is not None:
            self.held.remove(old)
        self.held.append(pair)

    @rule()
    def pop(self) -> None:
        least = min(self.held, key=lambda p: p.damage, default=None)
        assert self.queue.pop() is least
        if least is not None:
            self.held.remove(least)

    @rule(key=KEYS)
    def discard(self, key: int) -> None:
        old = self.of(key)
        assert self.queue.discard(key) is old
        if old is not None:
            self.held.remove(old)

    @invariant()
    def as_long_as_the_list(self) -> None:
        assert len(self.queue) == len(self.held)

    def teardown(self) -> None:
        while self.held:
            self.pop()
        assert self.queue.pop() is None


AgainstAList.TestCase.settings = settings(stateful_step_count=30)
TestAgainstAList = AgainstAList.TestCase


def test_discarded_pairs_do_not_pile_up() -> None:
    queue: ReclaimQueue[Pair] = ReclaimQueue()
    keep = [Pair(("keep", i), 0.5 + i) for i in range(10)]
    for pair in keep:
        queue.push(pair)
    for i in range(10_000):
        queue.push(Pair(i, 1.0 / (i + 1)))
        assert queue.discard(i) is not None
    assert len(queue._heap) <= 65
    assert [queue.pop() for _ in keep] == keep
