"""Lists of copies (mechanisms/twins/copies.py): what is covered, lives on, and must stay."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memshare.core.token_map import TokenMap
from memshare.mechanisms.twins.copies import TokenCopies

SIZE, BLOCKS = 4, 12
TOKENS = SIZE * BLOCKS


def learnt(known: TokenCopies, *pairs: tuple[int, int, float]) -> TokenCopies:
    earlier, later, similarity = (list(column) for column in zip(*pairs, strict=True))
    known.learn(
        np.array(earlier, np.int32), np.array(later, np.int32), np.array(similarity, np.float32)
    )
    return known


def lists() -> TokenCopies:
    known = TokenCopies(TokenMap(SIZE))
    known.grow(BLOCKS)
    return known


def blocks(mask: np.ndarray) -> list[int]:
    return np.flatnonzero(mask).tolist()


def pairs_of(found: tuple[np.ndarray, np.ndarray]) -> list[tuple[int, int]]:
    return list(zip(found[0].tolist(), found[1].tolist(), strict=True))


def test_both_copies_cover_each_other() -> None:
    known = learnt(lists(), (0, 9, 0.8), (1, 10, 0.4))
    assert known.coverage[0] == pytest.approx((0.8 + 0.4) / SIZE)
    assert known.coverage[2] == pytest.approx((0.8 + 0.4) / SIZE)


def test_the_nearest_copy_counts() -> None:
    known = learnt(lists(), (0, 9, 0.8))
    learnt(known, (9, 20, 0.5))
    twins, similarity = known.best
    assert (twins[0], twins[9], twins[20]) == (9, 0, 9)
    assert similarity[[0, 9, 20]] == pytest.approx([0.8, 0.8, 0.5])


def test_what_is_unlike_is_no_twin() -> None:
    known = learnt(lists(), (0, 9, -0.1), (1, 10, 0.0))
    assert not known.coverage.any()


def test_giving_up_a_block_joins_the_neighbours() -> None:
    # 1 - 5 - 9, and 2 - 6.
    known = learnt(learnt(lists(), (1, 5, 0.9), (2, 6, 0.9)), (5, 9, 0.8))
    assert not known.last_copies.any()
    assert pairs_of(known.give_up(1)) == [(1, 9)], "worth comparing"
    assert known.coverage[0] == pytest.approx(0.8 / SIZE), "as long as it is a guess: the less"
    assert blocks(known.last_copies) == [0], "6 lives on in 2 alone"
    learnt(known, (1, 9, 0.5))
    assert known.coverage[0] == pytest.approx(0.5 / SIZE)
    assert known.coverage[1] == 0.0, "there is nothing left to give up"


def test_neighbours_in_one_block_do_not_cover_each_other() -> None:
    # 4 - 0, 4 - 2 would leave 0 and 2 of one block as neighbours.
    known = learnt(learnt(lists(), (0, 4, 0.9)), (4, 2, 0.9))
    assert pairs_of(known.give_up(1)) == []
    assert known.coverage[0] == 0.0
    assert blocks(known.last_copies) == [0]


def test_a_copy_between_two_others_takes_its_place() -> None:
    known = learnt(lists(), (0, 9, 0.9))
    learnt(known, (0, 20, 0.7))  # a longer run ended in 0 than in 9
    assert known.best[1][[0, 9, 20]] == pytest.approx([0.7, 0.7, 0.7])
    known.give_up(0)
    assert not known.last_copies.any(), "9 and 20 have each other"


def test_a_chain_is_put_in_front_of_what_stood_there() -> None:
    known = learnt(lists(), (0, 9, 0.9))
    learnt(known, (0, 20, 0.7), (20, 30, 0.6))
    for index in (0, 5, 7):
        known.give_up(index)
    assert blocks(known.last_copies) == [2], "9 is the last of four"


def test_what_stood_in_two_places_may_come_behind_the_same_token() -> None:
    known = learnt(lists(), (21, 24, 0.9), (25, 32, 0.8))
    learnt(known, (21, 25, 0.7), (25, 28, 0.6))  # 24 and 32 both come behind 28
    assert known._next[[21, 25, 28]].tolist() == [25, 28, 24]
    assert known._next[24] == 32
    assert known._previous[[24, 32]].tolist() == [28, 24]


def test_a_twin_that_is_found_too_late_stays() -> None:
    known = lists()
    known.give_up(0)  # nothing was known of it
    late = np.array([1, 2], np.int32), np.array([9, 10], np.int32)
    assert pairs_of(known.keep(*late)) == []
    assert blocks(known.last_copies) == [2]
    # Something stands for them now: the next twins are compared with that.
    again = known.keep(np.array([1], np.int32), np.array([13], np.int32))
    assert pairs_of(again) == [(9, 13)]
    learnt(known, (9, 13, 0.9), (10, 18, 0.9))
    assert not known.last_copies.any()
    known.give_up(2)
    assert blocks(known.last_copies) == [3, 4]


class Machine:
    """The lists beside a model that knows who has ever been a copy of whom."""

    def __init__(self) -> None:
        self.known = lists()
        self.group = list(range(TOKENS))  # tokens with one number are copies
        self.gone: set[int] = set()
        self.linked: set[int] = set()
        self.leading: set[int] = set()  # tokens that another one was linked to
        self.given_up: set[int] = set()

    def copies(self, token: int) -> list[int]:
        return [
            t
            for t in range(TOKENS)
            if self.group[t] == self.group[token] and t // SIZE not in self.gone
        ]

    def join(self, earlier: int, later: int) -> None:
        self.linked.add(later)
        self.leading.add(earlier)
        old, now = self.group[later], self.group[earlier]
        self.group = [now if g == old else g for g in self.group]

    def keep(self, late: dict[int, int]) -> None:
        """Twins of tokens that are gone, found late."""
        if not late:
            return
        for gone, later in late.items():
            self.join(gone, later)
            self.given_up.add(gone)  # from now on it lives on
        columns = np.array([*late], np.int32), np.array([*late.values()], np.int32)
        for heir, later in pairs_of(self.known.keep(*columns)):
            learnt(self.known, (heir, later, 0.5))

    def check(self) -> None:
        known = self.known
        for token in range(TOKENS):
            after, before = int(known._next[token]), int(known._previous[token])
            if token // SIZE in self.gone:
                assert before == -1
                continue
            for neighbour, back in ((after, known._previous), (before, known._next)):
                if neighbour >= 0:
                    assert back[neighbour] == token, "neighbours know each other"
                    assert neighbour // SIZE not in self.gone
                    assert neighbour // SIZE != token // SIZE
                    assert self.group[neighbour] == self.group[token]
        seen: set[int] = set()
        for head in range(TOKENS):
            if head // SIZE in self.gone or known._previous[head] >= 0:
                continue
            token = head
            while token >= 0:
                assert token not in seen, "lists are disjoint and end"
                seen.add(token)
                token = int(known._next[token])
        assert len(seen) == TOKENS - SIZE * len(self.gone), "no circle"
        for token in self.given_up:
            assert self.copies(token), "the last copy was given up"


@given(st.data())
def test_a_given_up_token_always_lives_on_if_it_had_a_twin(data: st.DataObject) -> None:
    machine = Machine()
    known = machine.known
    for _ in range(data.draw(st.integers(1, 25))):
        pairs = data.draw(
            st.lists(
                st.tuples(st.integers(0, TOKENS - 2), st.integers(1, 20), st.floats(0.1, 1)),
                max_size=8,
            )
        )
        # As stage one makes them: every token is linked to an earlier one once in its life, no
        # earlier one occurs twice in one answer, and neither lies in a block that is gone.
        new: dict[int, tuple[int, int, float]] = {}
        late: dict[int, int] = {}
        for p, ahead, similarity in pairs:
            q = p + ahead
            taken = machine.linked | {later for _, later, _ in new.values()} | {*late.values()}
            if q >= TOKENS or p // SIZE == q // SIZE or q in taken or p in new or p in late:
                continue
            if q // SIZE in machine.gone:
                continue
            if p // SIZE not in machine.gone:
                new[p] = (p, q, similarity)
            elif q not in machine.leading and q not in new:  # it has just been written
                late[p] = q
        machine.keep(late)
        if new:
            learnt(known, *new.values())
            for p, q, _ in new.values():
                machine.join(p, q)
        machine.check()
        free = [b for b in range(BLOCKS) if b not in machine.gone and not known.last_copies[b]]
        if not free:
            break
        index = data.draw(st.sampled_from(free))
        for token in range(index * SIZE, index * SIZE + SIZE):
            if known.best[0][token] >= 0:
                machine.given_up.add(token)
        known.give_up(index)
        machine.gone.add(index)
        machine.check()
