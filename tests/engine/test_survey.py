"""What the scheduler side knows of tokens and their twins (memshare/engine/survey.py)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memshare.engine.survey import TwinMap

pytestmark = pytest.mark.engine

SIZE, BLOCKS = 4, 12


def learnt(known: TwinMap, *pairs: tuple[int, int, float]) -> TwinMap:
    earlier, later, similarity = (list(column) for column in zip(*pairs, strict=True))
    known.learn(
        np.array(earlier, np.int32), np.array(later, np.int32), np.array(similarity, np.float32)
    )
    return known


def twin_map() -> TwinMap:
    known = TwinMap(SIZE)
    known.grow(BLOCKS)
    return known


def test_coverage_is_that_of_the_least_covered_quarter() -> None:
    known = learnt(twin_map(), (0, 9, 0.5), (1, 10, 0.9), (2, 11, 0.7), (3, 12, 0.8))
    assert known.coverage[:2].tolist() == [0.5, 0.0]
    assert learnt(known, (0, 20, 0.8)).coverage[0] == pytest.approx(0.7)


def test_the_best_twin_stays_and_the_newest_of_equals() -> None:
    known = learnt(twin_map(), (0, 9, 0.5), (0, 10, 0.9), (0, 11, 0.2), (1, 12, -0.1))
    assert known._twins[:2].tolist() == [10, -1]
    assert learnt(known, (0, 13, 0.8))._twins[0] == 10
    assert learnt(known, (0, 14, known._similarity[0]))._twins[0] == 14


def test_giving_up_a_block_passes_its_tokens_on() -> None:
    # 1 -> 5 -> 9; 2 -> 6, which has no twin.
    known = learnt(twin_map(), (1, 5, 0.9), (5, 9, 0.8), (2, 6, 0.9))
    assert not known.last_copies.any()
    orphans, heirs = known.give_up(1)
    assert list(zip(orphans.tolist(), heirs.tolist(), strict=True)) == [(1, 9)], "worth a look"
    assert known.coverage[0] == 0.0
    assert np.flatnonzero(known.last_copies).tolist() == [2], "5 was given up and lives on in 9"


def test_a_twin_that_is_found_too_late_stays() -> None:
    known = twin_map()
    known.give_up(0)  # nothing was known of it
    known.keep(np.array([1, 2], np.int32), np.array([9, 10], np.int32))
    assert np.flatnonzero(known.last_copies).tolist() == [2]
    # Something stands for them now: later twins need not stay as well.
    known.keep(np.array([1], np.int32), np.array([13], np.int32))
    assert np.flatnonzero(known.last_copies).tolist() == [2]
    learnt(known, (9, 17, 0.9), (10, 18, 0.9))
    assert not known.last_copies.any()
    known.give_up(2)
    assert np.flatnonzero(known.last_copies).tolist() == [4]


@given(st.data())
def test_a_given_up_token_always_lives_on_if_it_had_a_twin(data: st.DataObject) -> None:
    known = twin_map()
    holders: dict[int, int] = {}  # given-up token -> where it lives on
    gone: set[int] = set()
    for _ in range(data.draw(st.integers(1, 30))):
        pairs = st.tuples(st.integers(0, SIZE * BLOCKS - 2), st.integers(1, 20), st.floats(0.1, 1))
        new = [
            (p, min(p + ahead, SIZE * BLOCKS - 1), similarity)
            for p, ahead, similarity in data.draw(st.lists(pairs, max_size=10))
        ]
        new = [(p, q, s) for p, q, s in new if p // SIZE != q // SIZE]
        new = [(p, q, s) for p, q, s in new if not {p // SIZE, q // SIZE} & gone]
        if new:
            learnt(known, *new)
        free = [b for b in range(BLOCKS) if b not in gone and not known.last_copies[b]]
        if not free:
            break
        index = data.draw(st.sampled_from(free))
        twins = known._twins.copy()
        known.give_up(index)
        gone.add(index)
        for token in range(index * SIZE, index * SIZE + SIZE):
            if twins[token] >= 0:
                holders[token] = int(twins[token])
        for token, holder in holders.items():
            if holder // SIZE == index:
                assert twins[holder] >= 0, "the last copy was given up"
                holders[token] = int(twins[holder])
        assert all(holder // SIZE not in gone for holder in holders.values())
        assert not any(int(t) // SIZE in gone for t in known._twins if t >= 0)
