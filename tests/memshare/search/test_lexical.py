"""Stage one's search against a plain cosine over all steps that are remembered."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from memshare.search.lexical import StepIndex

STEPS = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=8), max_size=30)
THRESHOLDS = st.sampled_from([0.0, 0.3, 0.7, 0.9, 1.0]) | st.floats(0.0, 1.0)


def reference_cosine(a: list[int], b: list[int]) -> float:
    x, y = (np.bincount(step, minlength=6).astype(float) for step in (a, b))
    return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


@dataclass
class Reference:
    """Remembers plain lists and compares all of them."""

    max_steps: int
    steps: list[tuple[int, list[int]]] = field(default_factory=list)
    gone: set[int] = field(default_factory=set)

    def scores(self, tokens: list[int]) -> list[tuple[int, float]]:
        """Best first, the newest first among equals."""
        alive = [(label, old) for label, old in reversed(self.steps) if label not in self.gone]
        scored = [(label, round(reference_cosine(tokens, old), 6)) for label, old in alive]
        return sorted(scored, key=lambda item: -item[1])

    def add(self, label: int, tokens: list[int]) -> None:
        self.steps = [*self.steps, (label, tokens)][-self.max_steps :]


def assert_agree(
    found: list[tuple[int, float]], expected: list[tuple[int, float]], threshold: float, limit: int
) -> None:
    """Scores within float32's rounding of the threshold or of each other may go either way."""
    sure = [score for _, score in expected if score > threshold + 1e-5]
    possible = {label: score for label, score in expected if score >= threshold - 1e-5}
    assert len(found) >= min(limit, len(sure))
    assert len(found) <= limit
    assert len({label for label, _ in found}) == len(found)
    for (label, score), best in zip(found, expected, strict=False):
        assert score == pytest.approx(possible[label], abs=1e-5)
        assert score == pytest.approx(best[1], abs=1e-5), "none better was left out"
        assert 0.0 <= score <= 1.0


@given(STEPS, THRESHOLDS, st.integers(1, 5), st.integers(2, 9), st.data())
def test_agrees_with_a_plain_cosine(
    steps: list[list[int]], threshold: float, limit: int, max_steps: int, data: st.DataObject
) -> None:
    index: StepIndex[int] = StepIndex(max_steps)
    reference = Reference(max_steps)
    for label, tokens in enumerate(steps):
        if data.draw(st.integers(0, 5), "0 discards") == 0:
            parity = data.draw(st.integers(0, 2))
            index.discard(lambda old, parity=parity: old % 3 == parity)
            reference.gone |= {old for old, _ in reference.steps if old % 3 == parity}
        found = index.match_and_add(tokens, label, threshold, limit)
        assert_agree(found, reference.scores(tokens), threshold, limit)
        reference.add(label, tokens)
        assert len(index) == len(reference.steps)


@given(st.lists(st.integers(0, 2000), min_size=1, max_size=300), st.randoms())
@example([7] * 256, Random(0))
def test_the_same_bag_meets_a_threshold_of_exactly_one(tokens: list[int], random: Random) -> None:
    index: StepIndex[str] = StepIndex(8)
    index.match_and_add(tokens, "first", 1.0, 2)
    shuffled = random.sample(tokens, len(tokens))
    assert index.match_and_add(shuffled, "again", 1.0, 2) == [("first", pytest.approx(1.0))]
    # Negative control: one more token of another kind, and it is not the same bag.
    assert index.match_and_add([*tokens, 2001], "other", 1.0, 2) == []


def test_the_newest_comes_first_among_equals() -> None:
    index: StepIndex[int] = StepIndex(16)
    for label in range(6):
        index.match_and_add([1, 2, 3], label, 1.0, 1)
    index.match_and_add([1, 2, 4], 99, 0.0, 1)
    found = index.match_and_add([3, 2, 1], 7, 0.5, 4)
    assert [label for label, _ in found] == [5, 4, 3, 2], "a newer but worse one comes after"
    # In other proportions the cosine is 1 all the same, though rounded differently.
    for times in (1, 3, 7, 11):
        index.match_and_add([8, 9, 10] * times, 100 + times, 0.0, 1)
    found = index.match_and_add([8, 9, 10] * 5, 0, 0.9, 4)
    assert [label for label, _ in found] == [111, 107, 103, 101]


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_what_is_discarded_matches_nothing(threshold: float) -> None:
    index: StepIndex[str] = StepIndex(8)
    index.match_and_add([1, 2], "gone", 1.0, 4)
    index.match_and_add([1, 2], "kept", 1.0, 4)
    index.discard(lambda label: label == "gone")
    found = index.match_and_add([1, 2], "new", threshold, 4)
    assert [label for label, _ in found] == ["kept"]


def test_the_oldest_are_forgotten_first() -> None:
    index: StepIndex[int] = StepIndex(4)
    for label in range(50):
        found = index.match_and_add([1, 2, 3], label, 0.9, 64)
        assert [old for old, _ in found] == list(range(label))[::-1][:4]
    assert len(index) == 4


def test_memory_is_bounded_by_the_steps_kept() -> None:
    index: StepIndex[int] = StepIndex(8)
    generator = np.random.default_rng(0)
    for label in range(1000):
        tokens = generator.integers(0, 500, 64).tolist()
        index.match_and_add(tokens, label, 0.9, 2)
    assert len(index._labels) <= 16
    assert len(index._ids) <= 2048
    assert len(index._norms) <= 64


def test_large_ids_and_long_steps_find_room() -> None:
    index: StepIndex[int] = StepIndex(300)
    for label in range(200):
        tokens = [label, 1000 * label, 150_000, *range(label)]
        assert index.match_and_add(tokens, label, 1.0, 1) == []
    again = [199, 199_000, 150_000, *range(199)]
    assert index.match_and_add(again, 200, 1.0, 1) == [(199, pytest.approx(1.0))]
