"""Twins: the search against a slow one that reads the definition word by word."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memshare.evaluate import Answer, NewSteps, TwinEvaluator, TwinLinks
from memshare.twins import TwinIndex


def cut(tokens: list[int], sizes: list[int]) -> list[tuple[int, list[int]]]:
    """Steps of the given sizes, over and over: (position, tokens)."""
    bounds = [0]
    while bounds[-1] < len(tokens):
        bounds.append(min(bounds[-1] + sizes[len(bounds) % len(sizes)], len(tokens)))
    return [(a, tokens[a:b]) for a, b in pairwise(bounds)]


def links_of(index: TwinIndex, steps: list[tuple[int, list[int]]]) -> dict[int, int]:
    links: dict[int, int] = {}
    for position, tokens in steps:
        earlier, later = index.add(tokens, position)
        assert earlier.dtype == later.dtype == np.int32
        assert (np.diff(earlier) > 0).all()
        assert ((position <= later) & (later < position + len(tokens))).all()
        links.update(zip(earlier.tolist(), later.tolist(), strict=True))
    return links


def slow_links(
    tokens: list[int], steps: list[tuple[int, list[int]]], shortest_run: int
) -> dict[int, int]:
    links: dict[int, int] = {}
    quality: dict[int, int] = {}
    for position, step in steps:
        found = []
        for q in range(position, position + len(step)):
            for order in (8, 4, 2, 1):
                if order < shortest_run:
                    break
                run = tokens[q + 1 - order : q + 1] if q + 1 >= order else None
                ends = [
                    p
                    for p in range(order - 1, position)
                    if run is not None and tokens[p + 1 - order : p + 1] == run
                ]
                if ends:
                    found.append((order, q, ends[-1]))
                    break
        before = dict(quality)
        for order, q, p in sorted(found):
            if order >= before.get(p, 0):
                links[p], quality[p] = q, order
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
    # Runs that share a place in a table hide older ones: rare, and only a longer run is missed.
    same = sum(found.get(p) == q for p, q in expected.items())
    assert same >= 0.9 * len(expected) - 1
    assert all(tokens[p] == tokens[q] and p < q for p, q in found.items())


def test_a_passage_written_again_is_linked_token_by_token_at_any_offset() -> None:
    passage = list(range(100, 140))
    tokens = [*range(7), *passage, *range(20, 33), *passage, 99]
    links = links_of(TwinIndex(), [(0, tokens[:47]), (47, tokens[47:])])
    assert links == {7 + i: 60 + i for i in range(40)}


def test_the_longest_common_run_wins_and_stays() -> None:
    tokens = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    index = TwinIndex()
    index.add(tokens, 0)
    again = index.add([50, 9, 51, *tokens], 9)
    assert dict(zip(*map(list, again), strict=True))[8] == 20, "not the 9 that stands alone"
    # A shorter run does not take the place of a longer one; as long a one, of the newest, does.
    links = links_of(index, [(21, [52, 9])])
    assert 8 not in links
    assert links == {20: 22}


def test_a_repetition_that_is_too_short_makes_no_twin() -> None:
    index = TwinIndex(shortest_run=4)
    index.add([1, 2, 3, 4, 5, 60], 0)
    assert links_of(index, [(6, [9, 2, 3, 4, 8, 60])]) == {}
    assert links_of(index, [(12, [2, 3, 4, 5, 61])]) == {4: 15}, "only where the fourth is the same"


def test_it_grows_and_keeps_what_it_knows() -> None:
    rng = np.random.default_rng(0)
    passage = rng.integers(0, 50000, 64).tolist()
    index = TwinIndex()
    index.add(passage, 0)
    position = len(passage)
    while position < 40_000:
        index.add(rng.integers(0, 50000, 200).tolist(), position)
        position += 200
    earlier, later = index.add(passage, position)
    linked = dict(zip(earlier.tolist(), later.tolist(), strict=True))
    assert sum(linked.get(i) == position + i for i in range(64)) >= 60
    assert len(index) == position + 64


def test_a_request_that_begins_again_is_new() -> None:
    index = TwinIndex()
    index.add([1, 2, 3], 0)
    index.add([1, 2, 3], 3)
    earlier, _ = index.add([1, 2, 3], 0)
    assert len(earlier) == 0
    assert len(index) == 3


def news(request: str, position: int, *steps: list[int]) -> NewSteps:
    bounds = np.cumsum([0, *map(len, steps)]).tolist()
    tokens = [token for step in steps for token in step]
    return NewSteps(request, 0, request, position, tokens, tuple(bounds), 0.9, 1.0)


def test_requests_do_not_see_each_other_and_can_be_forgotten() -> None:
    evaluator = TwinEvaluator(shortest_run=1, max_requests=2)
    answer = evaluator.evaluate([news("a", 5, [1, 2], [3, 1, 2]), news("b", 0, [1, 2])])
    assert Answer.is_sound(answer)
    found = {(x.request_id, p, q) for x in answer.links for p, q in zip(*x[2:], strict=True)}
    assert found == {("a", 5, 8), ("a", 6, 9)}
    evaluator.forget(["a"], ())
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
        GOOD._replace(earlier=GOOD.earlier[::-1]),
        GOOD._replace(earlier=np.array([-1, 4], np.int32)),
        GOOD._replace(earlier=GOOD.earlier[:, None], later=GOOD.later[:, None]),
        GOOD._replace(later=np.array([6, 4], np.int32)),
    ],
    ids=repr,
)
def test_links_of_another_shape_are_not_sound(bad: object) -> None:
    assert Answer.is_sound(Answer((), 0.0, (GOOD,)))
    assert not Answer.is_sound(Answer((), 0.0, (GOOD, bad)))  # type: ignore[arg-type]
