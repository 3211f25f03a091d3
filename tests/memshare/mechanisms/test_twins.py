"""Twins: the search against a slow one that reads the definition word by word."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memshare.mechanisms.twins.finder import TwinFinder
from memshare.mechanisms.twins.index import TwinIndex
from memshare.search.evaluate import EvaluatorAnswer, NewSteps, TwinLinks


def cut(tokens: list[int], sizes: list[int]) -> list[tuple[int, list[int]]]:
    """Steps of the given sizes, over and over: (position, tokens)."""
    bounds = [0]
    while bounds[-1] < len(tokens):
        bounds.append(min(bounds[-1] + sizes[len(bounds) % len(sizes)], len(tokens)))
    return [(a, tokens[a:b]) for a, b in pairwise(bounds)]


def links_of(index: TwinIndex, steps: list[tuple[int, list[int]]]) -> dict[int, int]:
    """Earlier token of each later one."""
    links: dict[int, int] = {}
    for position, tokens in steps:
        earlier, later = index.add_tokens(tokens, position)
        assert earlier.dtype == later.dtype == np.int32
        assert (np.diff(later) > 0).all()
        assert len(set(earlier.tolist())) == len(earlier)
        assert (later < position + len(tokens)).all()
        new = dict(zip(later.tolist(), earlier.tolist(), strict=True))
        assert not set(new) & set(links), "a token is linked once"
        links |= new
    return links


def slow_links(
    tokens: list[int], steps: list[tuple[int, list[int]]], shortest_run: int
) -> dict[int, int]:
    links: dict[int, int] = {}
    linked: set[int] = set()
    for position, step in steps:
        ends: dict[int, int] = {}
        for q in range(position, position + len(step)):
            for order in (8, 4, 2, 1):
                run = tokens[q + 1 - order : q + 1] if q + 1 >= order else None
                known = [
                    p
                    for p in range(order - 1, position)
                    if run is not None and tokens[p + 1 - order : p + 1] == run
                ]
                if known and order >= shortest_run:
                    ends[q] = known[-1]
                    break
        new = dict(ends)
        for back in range(1, shortest_run):
            for q, p in ends.items():
                if q - back not in new and q - back not in linked:
                    new[q - back] = p - back
        linked |= set(new)
        newest: dict[int, int] = {}  # copy of an earlier token: the next one follows that
        taken: set[int] = set()
        for q in sorted(new):
            p = new[q]
            behind, newest[p] = newest.get(p, p), q
            if behind not in taken:  # a token has one copy behind it
                taken.add(behind)
                links[q] = behind
    return links


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=150),
    st.lists(st.integers(1, 40), min_size=1, max_size=4),
    st.sampled_from((1, 2, 4, 8)),
)
def test_the_search_finds_what_the_definition_says(
    tokens: list[int], sizes: list[int], shortest_run: int
) -> None:
    steps = cut(tokens, sizes)
    found = links_of(TwinIndex(shortest_run), steps)
    expected = slow_links(tokens, steps, shortest_run)
    # Runs that share a place in a table hide older ones: rare.
    same = sum(found.get(q) == p for q, p in expected.items())
    assert same >= 0.9 * len(expected) - 2
    assert all(tokens[p] == tokens[q] and p < q for q, p in found.items())


def test_a_passage_written_again_is_linked_token_by_token_at_any_offset() -> None:
    passage = list(range(100, 140))
    tokens = [*range(7), *passage, *range(20, 33), *passage, 99]
    links = links_of(TwinIndex(), [(0, tokens[:47]), (47, tokens[47:])])
    assert links == {60 + i: 7 + i for i in range(40)}


def test_the_longest_common_run_wins() -> None:
    index = TwinIndex(shortest_run=2)
    steps = [(0, [1, 2, 3, 4, 5]), (5, [70, 4, 5, 71])]
    assert links_of(index, steps) == {6: 3, 7: 4}
    assert links_of(index, [(9, [2, 3, 4, 5, 72])]) == {9: 1, 10: 2, 11: 3, 12: 4}


def test_copies_within_one_step_make_a_chain() -> None:
    index = TwinIndex()
    assert links_of(index, [(0, [9]), (1, [9, 8, 9, 8, 9])]) == {1: 0, 3: 1, 5: 3}


def test_a_run_has_twins_from_its_first_token_on_if_it_is_long_enough() -> None:
    index = TwinIndex(shortest_run=4)
    index.add_tokens([1, 2, 3, 4, 5, 60], 0)
    assert links_of(index, [(6, [9, 2, 3, 4, 8, 60])]) == {}, "three are chance"
    assert links_of(index, [(12, [2, 3, 4, 5, 61])]) == {12: 1, 13: 2, 14: 3, 15: 4}
    # Where a step ends within a run, the rest of that is in the next one.
    assert links_of(index, [(17, [7, 1, 2]), (20, [3, 4, 62])]) == {18: 0, 19: 1, 20: 2, 21: 3}


def test_it_grows_and_keeps_what_it_knows() -> None:
    rng = np.random.default_rng(0)
    passage = rng.integers(0, 50000, 64).tolist()
    index = TwinIndex()
    index.add_tokens(passage, 0)
    position = len(passage)
    while position < 40_000:
        index.add_tokens(rng.integers(0, 50000, 200).tolist(), position)
        position += 200
    earlier, later = index.add_tokens(passage, position)
    linked = dict(zip(later.tolist(), earlier.tolist(), strict=True))
    assert sum(linked.get(position + i) == i for i in range(64)) >= 60
    assert len(index) == position + 64


def test_a_request_that_begins_again_is_new() -> None:
    index = TwinIndex()
    index.add_tokens([1, 2, 3], 0)
    index.add_tokens([1, 2, 3], 3)
    earlier, _ = index.add_tokens([1, 2, 3], 0)
    assert len(earlier) == 0
    assert len(index) == 3


def news(request: str, position: int, *steps: list[int]) -> NewSteps:
    bounds = np.cumsum([0, *map(len, steps)]).tolist()
    tokens = [token for step in steps for token in step]
    return NewSteps(request, 0, request, position, tokens, tuple(bounds), 0.9, 1.0)


def test_requests_do_not_see_each_other_and_can_be_forgotten() -> None:
    evaluator = TwinFinder(shortest_run=1, max_requests=2)
    answer = evaluator.evaluate([news("a", 5, [1, 2], [3, 1, 2]), news("b", 0, [1, 2])])
    assert EvaluatorAnswer.is_sound(answer)
    found = {(x.request_id, p, q) for x in answer.links for p, q in zip(*x[2:], strict=True)}
    assert found == {("a", 5, 8), ("a", 6, 9)}
    evaluator.forget_histories(["a"], ())
    assert not any(len(x.earlier) for x in evaluator.evaluate([news("a", 10, [1, 2])]).links)
    # The least recently used goes when there are too many.
    evaluator.evaluate([news("c", 0, [7])])
    assert not any(len(x.earlier) for x in evaluator.evaluate([news("b", 2, [1, 2])]).links)


GOOD = TwinLinks("a", 0, np.array([1, 4], np.int32), np.array([6, 9], np.int32))


@pytest.mark.parametrize(
    "bad",
    [
        tuple(GOOD),
        GOOD._replace(request_id=1),
        GOOD._replace(generation=None),
        GOOD._replace(earlier=[1, 4]),
        GOOD._replace(earlier=GOOD.earlier.astype(np.int64)),
        GOOD._replace(earlier=GOOD.earlier[:1]),
        GOOD._replace(earlier=np.array([4, 4], np.int32)),
        GOOD._replace(later=GOOD.later[::-1]),
        GOOD._replace(earlier=np.array([-1, 4], np.int32)),
        GOOD._replace(earlier=GOOD.earlier[:, None], later=GOOD.later[:, None]),
        GOOD._replace(later=np.array([6, 4], np.int32)),
    ],
    ids=repr,
)
def test_links_of_another_shape_are_not_sound(bad: object) -> None:
    assert EvaluatorAnswer.is_sound(EvaluatorAnswer((), 0.0, (GOOD,)))
    assert not EvaluatorAnswer.is_sound(EvaluatorAnswer((), 0.0, (GOOD, bad)))  # type: ignore[arg-type]
