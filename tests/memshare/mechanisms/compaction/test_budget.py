"""Which requests lose how many blocks in a round (memshare/mechanisms/compaction/budget.py)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from memshare.mechanisms.compaction.budget import Room, Round, plan_rounds


def room(entries: int, holes: int = 0, budget: int | None = None) -> Room:
    """A request with so many entries that may go, besides those that have gone."""
    state: Any = SimpleNamespace(holes=set(range(1000, 1000 + holes)), full=entries + holes)
    return Room(state, tuple(range(entries)), entries if budget is None else budget)


def plan(rooms: list[Room], wanted: int, fraction: float = 0.25, least: int = 1) -> list[int]:
    """Blocks that each request loses."""
    by_state = {id(each.state): each for each in rooms}
    ready = [(len(r.state.holes) / max(r.may_go, 1), r.state) for r in rooms]
    rounds = list(plan_rounds(ready, lambda state: by_state[id(state)], wanted, fraction, least))
    lost = {id(each.room.state): each.blocks for each in rounds}
    assert len(lost) == len(rounds), "each request is compacted once"
    return [lost.get(id(each.state), 0) for each in rooms]


def test_the_long_one_goes_first_and_a_round_is_large() -> None:
    assert plan([room(8), room(40)], wanted=1) == [0, 10]


def test_all_lose_a_share_before_one_loses_more() -> None:
    assert plan([room(8), room(40)], wanted=12) == [2, 10]
    assert plan([room(8), room(40)], wanted=13) == [2, 20]


def test_who_has_lost_more_waits() -> None:
    assert plan([room(20, holes=20), room(20)], wanted=5) == [0, 5]


def test_nobody_loses_more_than_the_budget() -> None:
    assert plan([room(8, budget=3), room(10, holes=6, budget=7)], wanted=100) == [3, 1]
    assert plan([room(10, holes=9, budget=7)], wanted=100) == [0], "it was larger once"


def test_small_rounds_wait() -> None:
    assert plan([room(8, budget=3), room(8, budget=8)], wanted=100, least=4) == [0, 8]


def test_who_must_wait_is_left_out() -> None:
    rooms = [room(8)]
    ready = [(0.0, rooms[0].state)]
    assert list(plan_rounds(ready, lambda state: None, 4, 0.25, 1)) == []


@given(
    sizes=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 30), st.integers(0, 80))),
    wanted=st.integers(0, 200),
    fraction=st.sampled_from([0.05, 0.25, 1.0]),
    least=st.integers(1, 5),
)
def test_as_much_as_is_wanted_or_all_there_is(
    sizes: list[tuple[int, int, int]], wanted: int, fraction: float, least: int
) -> None:
    rooms = [room(*size) for size in sizes]
    rooms = [Room(r.state, r.entries, min(r.budget, r.may_go)) for r in rooms]
    lost = plan(rooms, wanted, fraction, least)
    for each, blocks in zip(rooms, lost, strict=True):
        assert blocks == 0 or least <= blocks <= each.left
    if sum(lost) < wanted:  # nobody is left who could lose as many as a round wants
        assert all(r.left - n < least for r, n in zip(rooms, lost, strict=True))


def test_a_round_says_of_which_room_it_is() -> None:
    each = room(8)
    (found,) = plan_rounds([(0.0, each.state)], lambda state: each, 1, 0.5, 1)
    assert found == Round(each, 4)
