"""The guard's statistic: what it measures, how seldom it is wrong, and how soon it is right."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.guard.config import GuardConfig
from cluster.guard.evidence import Evidence, disagreement, interval
from cluster.guard.lot import Lot

CONFIG = GuardConfig()
LOGS = st.floats(-30.0, 0.0)
VALUES = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=60)


def alarm_at(values: np.ndarray, config: GuardConfig = CONFIG) -> int | None:
    """How many values it takes to an alarm; None if there is none."""
    evidence = Evidence(config.bound, config.window)
    for number, value in enumerate(values, start=1):
        evidence.add(float(value))
        if evidence.wealth >= 1.0 / config.false_alarm_rate:
            return number
    return None


@given(st.lists(st.tuples(LOGS, LOGS), min_size=1, max_size=50))
def test_disagreement_is_a_fraction_and_nothing_where_nothing_is_lost(
    pairs: list[tuple[float, float]],
) -> None:
    served, exact = [q for q, _ in pairs], [p for _, p in pairs]
    assert 0.0 <= disagreement(served, exact) <= 1.0
    assert disagreement(served, served) == 0.0
    assert disagreement(served, [max(p, q) for q, p in pairs]) == 0.0


@pytest.mark.parametrize("lengths", [(0, 0), (2, 1), (0, 3)])
def test_other_lengths_are_refused(lengths: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="log-probabilities"):
        disagreement([-1.0] * lengths[0], [-1.0] * lengths[1])


def test_of_sampled_tokens_it_is_the_distance_of_the_distributions() -> None:
    chance = np.random.default_rng(0)
    for sharpness in (0.3, 1.0, 3.0):
        q, p = chance.dirichlet(np.full(50, 1 / sharpness), 2)
        tokens = chance.choice(50, size=40_000, p=q)
        measured = disagreement(np.log(q[tokens]).tolist(), np.log(p[tokens]).tolist())
        assert measured == pytest.approx(0.5 * np.abs(p - q).sum(), abs=0.01)


@given(VALUES)
def test_wealth_is_never_expected_to_grow_while_the_claim_holds(values: list[float]) -> None:
    """Whatever came before, of two outcomes whose mean is the bound: the next wealth's mean."""
    evidence = Evidence(CONFIG.bound, window=len(values))
    for value in values:
        evidence.add(value)
    least, most = (Evidence(CONFIG.bound, len(values)) for _ in range(2))
    for value in values:
        least.add(value)
        most.add(value)
    least.add(0.0)
    most.add(1.0)
    expected = (1 - CONFIG.bound) * least.wealth + CONFIG.bound * most.wealth
    assert expected == pytest.approx(evidence.wealth, rel=1e-9)


@pytest.mark.parametrize("evenness", [0.01, 0.5, 1.0, 20.0])
def test_false_alarms_are_as_rare_as_stated_even_at_the_bound_itself(evenness: float) -> None:
    """2,000 requests of which 5 % are shadowed, on 1,000 servers; all means are the bound's."""
    chance = np.random.default_rng(1)
    rest = evenness * (1 - CONFIG.bound) / CONFIG.bound
    servers = chance.beta(evenness, rest, size=(1000, 100))
    alarms = sum(alarm_at(values) is not None for values in servers)
    # Of a rate of 1 % so many are seen in one run out of ten thousand (binomial).
    assert alarms <= 23


def test_a_good_policy_raises_no_alarm_in_2000_requests() -> None:
    """Values as measured for `twins`: 2 to 5 % of the tokens, unevenly over requests."""
    chance = np.random.default_rng(2)
    servers = chance.beta(0.8, 15.2, size=(1000, 100))
    assert servers.mean() == pytest.approx(0.05, abs=0.002)
    assert sum(alarm_at(values) is not None for values in servers) <= 1


def test_a_bad_policy_raises_one_within_200_requests() -> None:
    """5 % shadows of 200 requests are ten; a policy that loses 40 % of the tokens, unevenly."""
    chance = np.random.default_rng(3)
    servers = chance.beta(2.0, 3.0, size=(2000, 10))
    seen = [alarm_at(values) for values in servers]
    late = sum(number is None for number in seen)
    assert late <= 0.03 * len(servers)
    assert np.median([number for number in seen if number is not None]) <= 7


@pytest.mark.parametrize("good", [100, 400, 900])
def test_damage_that_begins_late_is_seen_soon(good: int) -> None:
    chance = np.random.default_rng(4)
    delays = []
    for _ in range(200):
        before = chance.beta(0.8, 39.2, size=good)
        values = np.concatenate([before, chance.beta(2.0, 3.0, size=60)])
        found = alarm_at(values)
        assert found is not None
        delays.append(found - good)
    assert min(delays) > 0
    assert np.median(delays) <= 15


@given(VALUES)
def test_the_interval_holds_the_mean(values: list[float]) -> None:
    found = interval(values)
    assert 0.0 <= found.low <= found.mean <= found.high <= 1.0
    assert found.mean == pytest.approx(math.fsum(values) / len(values))


def test_nothing_is_known_of_no_values() -> None:
    assert interval([]) == (0.0, 0.0, 1.0)


@pytest.mark.parametrize("count", [5, 30, 300])
def test_the_interval_covers_as_often_as_it_says(count: int) -> None:
    chance = np.random.default_rng(5)
    for mean in (0.02, 0.1, 0.5):
        runs = chance.beta(0.5, 0.5 * (1 - mean) / mean, size=(200, count))
        inside = sum(i.low <= mean <= i.high for i in map(interval, runs.tolist()))
        assert inside >= 0.92 * len(runs)
        assert count < 300 or np.mean([i.high - i.low for i in map(interval, runs.tolist())]) < 0.15


@given(st.floats(0.01, 1.0), st.integers(1, 2000), st.integers(0, 99))
def test_as_many_are_drawn_as_the_share_says(share: float, requests: int, seed: int) -> None:
    lot = Lot(share, random.Random(seed))
    drawn = sum(lot.draw() for _ in range(requests))
    assert abs(drawn - share * requests) <= 2.0


def test_nobody_can_tell_which_is_drawn() -> None:
    places = set()
    for seed in range(400):
        lot = Lot(0.05, random.Random(seed))
        places.add(next(i for i in range(20) if lot.draw()))
    assert places == set(range(20))
