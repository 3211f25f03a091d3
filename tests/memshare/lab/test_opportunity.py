"""What a text offers, by its tokens; and what the report makes of what an engine has seen."""

from __future__ import annotations

import numpy as np
import pytest

from memshare.lab.replay.opportunity import ObservedCoverage, mean_opportunity, opportunity, report

PASSAGE = list(range(1000, 1064))


def noise(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(2000, 50000, count).tolist()


def test_an_aligned_repetition_is_seen_by_both_measures() -> None:
    tokens = [*PASSAGE, *noise(64, 0), *PASSAGE, *noise(64, 1)]
    found = opportunity(tokens, 16)
    assert found.exact == found.aligned == pytest.approx(8 / 16), "both copies are counted"
    assert found.written_again == pytest.approx(4 / 16), "the first one only"


def test_a_repetition_at_another_offset_is_seen_by_twins_only() -> None:
    tokens = [*PASSAGE, *noise(69, 0), *PASSAGE, *noise(59, 1)]
    found = opportunity(tokens, 16)
    assert found.exact == found.aligned == 0.0
    assert found.written_again == pytest.approx(4 / 16)


def test_a_repetition_right_after_is_seen() -> None:
    """A line that checks the line before it."""
    tokens = [*PASSAGE[:32], *PASSAGE[:32], *noise(64, 0)]
    assert opportunity(tokens, 32).written_again == pytest.approx(1 / 4)


def test_what_does_not_repeat_offers_nothing() -> None:
    assert opportunity(noise(512, 2), 32) == (0.0, 0.0, 0.0)


def test_three_equal_slots_of_four_are_enough() -> None:
    changed = [*PASSAGE[:3], 7, *PASSAGE[4:7], 8]
    found = opportunity([*PASSAGE[:8], *changed], 4)
    assert found.exact == 0.0
    assert found.aligned == 1.0


def test_a_text_of_less_than_two_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fill two blocks of 32"):
        opportunity(noise(63, 0), 32)


def test_the_mean_is_over_texts() -> None:
    alike, unlike = [*PASSAGE[:32]] * 2, noise(64, 3)
    assert mean_opportunity([alike, unlike], 32).exact == 0.5


@pytest.mark.parametrize(
    ("coverage", "said"),
    [
        ([0.9] * 30, "Not suitable as it is: most of the memory is prompt"),
        ([0.9] * 5 + [0.1] * 75, "Hardly suitable: 5% of the blocks"),
        ([0.9] * 40 + [0.1] * 40, "about 40% of the blocks are well covered"),
    ],
    ids=["short", "unlike", "good"],
)
def test_the_verdict_follows_from_the_numbers(coverage: list[float], said: str) -> None:
    shown = report([ObservedCoverage(100, coverage)], 32)
    assert said in shown
    assert f"{1 - len(coverage) / 100:.0%} are prompt or recent window" in shown
