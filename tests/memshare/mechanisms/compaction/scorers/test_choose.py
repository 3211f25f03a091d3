"""Choosing tokens by worth and place."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memshare.mechanisms.compaction.scorers.contract import choose


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, float]:
    layers, heads, count = (
        draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
        draw(st.integers(0, 40)),
    )
    seed = draw(st.integers(0, 2**31))
    random = torch.Generator().manual_seed(seed)
    # Few different values: ties are the rule.
    worth = torch.randint(0, draw(st.integers(1, 40)), (layers, heads, count), generator=random)
    order = torch.rand(layers, heads, 2 * count, generator=random).argsort(-1)
    positions = order[..., :count].int()
    keep = draw(st.integers(0, count))
    return worth.float(), positions, keep, draw(st.sampled_from((0.0, 0.3, 0.7, 1.0)))


def one_head(worth: Tensor, positions: Tensor, keep: int, weight: float) -> set[int]:
    """The definition, head by head: the same ranks, and a plain sort."""

    def ranks(values: list[float]) -> dict[int, int]:
        order = sorted(range(len(values)), key=lambda i: (values[i], i))
        return {i: place for place, i in enumerate(order)}

    by_worth, by_place = ranks(worth.tolist()), ranks(positions.tolist())
    value = [max(by_worth[i], weight * by_place[i]) for i in range(len(worth))]
    return set(sorted(range(len(value)), key=lambda i: (-value[i], i))[:keep])


@settings(max_examples=200, deadline=None)
@given(cases())
def test_the_choice_is_the_definition(case: tuple[Tensor, Tensor, int, float]) -> None:
    worth, positions, keep, weight = case
    mask = choose(worth, positions, keep, weight)
    assert mask.shape == worth.shape
    assert mask.dtype == torch.bool
    assert (mask.sum(-1) == keep).all()
    for layer in range(worth.shape[0]):
        for head in range(worth.shape[1]):
            kept = set(mask[layer, head].nonzero()[:, 0].tolist())
            assert kept == one_head(worth[layer, head], positions[layer, head], keep, weight)


@settings(max_examples=50, deadline=None)
@given(cases())
def test_who_stays_of_few_stays_of_more(case: tuple[Tensor, Tensor, int, float]) -> None:
    worth, positions, keep, weight = case
    fewer = choose(worth, positions, keep // 2, weight)
    assert not (fewer & ~choose(worth, positions, keep, weight)).any()


def test_a_worthless_recent_token_stays_before_a_middling_old_one() -> None:
    worth = torch.tensor([[[9.0, 5.0, 6.0, 7.0, 0.0]]])
    positions = torch.arange(5).view(1, 1, 5)
    assert choose(worth, positions, 3, 0.7)[0, 0].tolist() == [True, False, False, True, True]
    assert choose(worth, positions, 3, 0.0)[0, 0].tolist() == [True, False, True, True, False]


def test_what_is_not_a_number_stays() -> None:
    worth = torch.tensor([[[1.0, float("nan"), 2.0]]])
    positions = torch.arange(3).view(1, 1, 3)
    assert choose(worth, positions, 1, 0.7)[0, 0].tolist() == [False, True, False]


@pytest.mark.parametrize("keep", [0, 3])
def test_none_and_all(keep: int) -> None:
    mask = choose(torch.rand(2, 2, 3), torch.arange(3).expand(2, 2, 3), keep)
    assert mask.sum() == 4 * keep
