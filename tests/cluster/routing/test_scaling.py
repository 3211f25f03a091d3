"""How many replicas there should be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import ScalingConfig
from cluster.routing.load import Load
from cluster.routing.scaling import decide

CONFIG = ScalingConfig(min_replicas=2, max_replicas=100)


def load(demand: float = 0.6, waiting: int = 0, preemptions: int = 0) -> Load:
    """A load with this demand, of 100 requests."""
    return Load(demand * (100 - waiting) / 100, 100 - waiting, waiting, 10_000, preemptions)


def wanted(*loads: Load, replicas: int | None = None) -> int:
    return decide(CONFIG, loads, len(loads) if replicas is None else replicas).replicas


def test_full_caches_add_replicas() -> None:
    assert wanted(*[load(0.86)] * 4) == 6, "5.3 at the load that is aimed at"
    assert "0.86 above 0.85" in decide(CONFIG, [load(0.86)] * 4, 4).reason


def test_waiting_requests_add_replicas() -> None:
    assert wanted(*[load(0.6, waiting=21)] * 4) == 5
    assert wanted(*[load(0.6, waiting=19)] * 4) == 4
    assert "21% of the requests wait" in decide(CONFIG, [load(0.6, 21)] * 4, 4).reason


def test_preemptions_add_replicas() -> None:
    assert wanted(load(preemptions=9), load(), load(), load()) == 5
    assert wanted(load(preemptions=8), load(), load(), load()) == 4
    assert "2.2 preemptions" in decide(CONFIG, [load(preemptions=9), *[load()] * 3], 4).reason


def test_slack_removes_replicas_but_not_near_the_other_thresholds() -> None:
    assert wanted(*[load(0.3)] * 6) == 3
    assert wanted(*[load(0.3, waiting=10, preemptions=1)] * 6) == 3
    assert wanted(*[load(0.3, waiting=11)] * 6) == 6
    assert wanted(*[load(0.3, preemptions=2)] * 3, *[load(0.3, preemptions=1)] * 3) == 6


def test_between_the_thresholds_nothing_changes() -> None:
    for demand in (0.5, 0.65, 0.84):
        assert wanted(*[load(demand)] * 10) == 10


def test_bounds_and_steps() -> None:
    assert wanted(*[load(0.0)] * 4) == 2
    assert wanted(*[load(0.0)] * 40) == 20, "no more than half at once"
    assert wanted(*[load(9.0)] * 4) == 8, "no more than twice as many at once"
    assert wanted(*[load(9.0)] * 80) == 100
    assert wanted(replicas=7) == 7, "no report, no change"
    assert wanted(replicas=1) == 2
    assert wanted(load(0.9), replicas=10) == 14, "the silent ones are taken to be like the others"


@given(
    total=st.floats(0.0, 300.0),
    replicas=st.integers(1, 100),
    down=st.floats(0.0, 0.6),
    target=st.floats(0.61, 0.7),
    up=st.floats(0.71, 2.0),
)
def test_a_steady_load_comes_to_rest_and_never_turns_back(
    total: float, replicas: int, down: float, target: float, up: float
) -> None:
    config = ScalingConfig(
        min_replicas=1, max_replicas=100, down_demand=down, target_demand=target, up_demand=up
    )
    directions = set()
    for _ in range(20):
        new = decide(config, [load(total / replicas)] * replicas, replicas).replicas
        if new == replicas:
            break
        directions.add(new > replicas)
        replicas = new
    else:
        raise AssertionError("it never comes to rest")
    assert len(directions) <= 1


@given(st.lists(st.floats(0.0, 5.0), min_size=1, max_size=20), st.integers(1, 100))
def test_bounds_hold_for_all_loads(demands: list[float], replicas: int) -> None:
    loads = [load(demand) for demand in demands]
    assert 2 <= decide(CONFIG, loads, replicas).replicas <= 100


def test_more_load_never_asks_for_fewer() -> None:
    numbers = [wanted(*[load(demand / 100)] * 10) for demand in range(300)]
    assert numbers == sorted(numbers)


@pytest.mark.parametrize(
    "wrong",
    [{"up_demand": 0.6}, {"down_demand": 0.65}, {"min_replicas": 200}, {"look_back_s": 5.0}],
)
def test_thresholds_out_of_order_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ScalingConfig.model_validate({"max_replicas": 100, **wrong})
