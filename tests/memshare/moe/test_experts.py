"""Experts of a step, and how unevenly they are used."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from memshare.config import ExpertsConfig
from memshare.engine.experts import ExpertStats, ExpertWatch, watch_experts
from memshare.moe.experts import HALF_LIFE, ExpertCounts, ExpertLoad

LAYERS = (0, 2)


class Routing:
    """Chooses expert 0 for every token in the first layer, experts in turn in the other."""

    layers = LAYERS

    def __init__(self) -> None:
        self._counts = torch.zeros(2, 4, dtype=torch.int32)
        self.listened: list[bool] = []

    def listen(self, on: bool) -> None:
        self.listened.append(on)

    def ids(self, tokens: int) -> torch.Tensor:
        return torch.tensor([[[0], [i % 4]] for i in range(tokens)])

    def counts(self, tokens: int) -> torch.Tensor:
        rows = [self.ids(tokens)[:, i].flatten().bincount(minlength=4) for i in range(2)]
        return self._counts.copy_(torch.stack(rows))


def counts(rows: list[list[int]], decodes: bool = True) -> ExpertCounts:
    return ExpertCounts(LAYERS, np.array(rows, dtype=np.int32), decodes)


def test_one_step_of_many_is_counted() -> None:
    routing = Routing()
    watch = ExpertWatch(routing, every=3, reports=True)
    seen = []
    for tokens in (5, 5, 6, 0, 5, 5, 7):  # a step without tokens is none
        watch.before_step(tokens, requests=5)
        step = watch.after_step()
        seen.append(None if step is None else int(step.chosen[0]))
    assert seen == [None, None, 6, None, None, None, 7]
    assert routing.listened == [step is not None for step in seen]


def test_what_was_counted_does_not_change_with_the_next_step() -> None:
    watch = ExpertWatch(Routing(), every=1, reports=True)
    steps = []
    for tokens in (3, 6):
        watch.before_step(tokens, requests=3)
        step = watch.after_step()
        assert step is not None
        steps.append(step)
    assert [step.counts.tolist() for step in steps] == [
        [[3, 0, 0, 0], [1, 1, 1, 0]],
        [[6, 0, 0, 0], [2, 2, 1, 1]],
    ]
    assert [step.touched.tolist() for step in steps] == [[1, 3], [1, 4]]
    assert [step.decodes for step in steps] == [True, False]


def test_a_rank_that_only_listens_reports_nothing() -> None:
    routing = Routing()
    watch = ExpertWatch(routing, every=2, reports=False)
    for _ in range(4):
        watch.before_step(5, requests=5)
        assert watch.after_step() is None
    assert routing.listened == [False, True] * 2, "in the same steps as the rank that counts"


def test_nobody_listens_unless_asked() -> None:
    nothing: Any = None
    assert watch_experts(nothing, nothing, ExpertsConfig()) is None


def test_skew_is_one_if_all_are_used_alike_and_forgets_what_is_old() -> None:
    load = ExpertLoad()
    assert load.skew().size == 0
    load.take(counts([[2, 2, 2, 2], [8, 0, 0, 0]]))
    assert load.skew().tolist() == [1.0, 4.0]
    for _ in range(20 * HALF_LIFE):
        load.take(counts([[1, 3, 1, 3], [1, 1, 1, 1]]))
    assert load.skew().round(2).tolist() == [1.5, 1.0]


def test_prompts_count_for_the_skew_alone() -> None:
    stats = ExpertStats()
    stats.take(counts([[4, 0, 0, 0], [1, 1, 1, 1]], decodes=False))
    payload = stats.take_stats()
    assert payload is not None
    assert payload["skews"] == {"0": 4.0, "2": 1.0}
    assert payload["counters"] == {}
    stats.take(counts([[4, 0, 0, 0], [1, 1, 2, 0]]))
    payload = stats.take_stats()
    assert payload is not None
    assert payload["counters"] == {"expert_steps": 1}
    assert payload["labelled"] == {
        "experts_touched": {"0": 1, "2": 3},
        "expert_tokens": {"0": 4, "2": 4},
    }
    assert stats.take_stats() is None
