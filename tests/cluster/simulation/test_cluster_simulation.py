"""The simulated cluster: does it keep its own laws, and does the product's code work in it?"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config import RoutingConfig, ScalingConfig
from cluster.evaluator_pool import seat_of
from cluster.simulation.engine import SimulatedEngine, SimulatedMachine, SimulatedRequest
from cluster.simulation.world import (
    ChatWorkload,
    Cluster,
    SimulatedOutcome,
    World,
    deviation,
    imbalance,
)

WORKLOAD = ChatWorkload(sessions=600, duration_s=120.0, output=600.0, longest=4096)
MACHINE = SimulatedMachine(kv_tokens=20_000, slots=64)


def outcome(
    seed: int = 0, workload: ChatWorkload = WORKLOAD, **cluster: object
) -> SimulatedOutcome:
    made: dict[str, object] = {"replicas": 8, "machine": MACHINE, "evaluators": 4, **cluster}
    return World(Cluster(**made), workload, seed).run()  # type: ignore[arg-type]


def finish(engine: SimulatedEngine, now: float = 0.0) -> list[tuple[float, SimulatedRequest]]:
    """Run until empty: when each request ended."""
    ended = []
    for _ in range(100_000):
        due = engine.next_event()
        if due is None:
            return ended
        assert due >= now
        now = due
        ended += [(now, request) for request in engine.step(now)]
    raise AssertionError("it never ends")


def request(output: int, prompt: int = 100, session: int = 0) -> SimulatedRequest:
    return SimulatedRequest(session, prompt, cached=0, output=output, arrived=0.0)


# ---- one engine ----


def test_one_request_takes_its_prompt_and_its_steps() -> None:
    machine = SimulatedMachine(step_s=0.01, step_per_request_s=0.0, prefill_per_s=1000)
    engine = SimulatedEngine(machine, 0.0)
    engine.add_request(request(output=50), 0.0)
    ((at, _),) = finish(engine)
    assert at == pytest.approx(0.1 + 0.5)


def test_a_full_cache_preempts_the_latest_and_all_end() -> None:
    engine = SimulatedEngine(SimulatedMachine(kv_tokens=1000), 0.0)
    for number in range(4):
        engine.add_request(request(output=300, session=number), 0.0)
    ended = finish(engine)
    assert engine.preemptions > 0
    assert [one.session for _, one in ended][:2] == [0, 1], "the first admitted are not disturbed"
    assert len(ended) == 4
    assert engine.prefilled > 400, "preempted prompts are recomputed"


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 400), st.integers(1, 500), st.floats(0, 20)), max_size=30),
    st.integers(1, 8),
)
def test_an_engine_loses_nothing(jobs: list[tuple[int, int, float]], slots: int) -> None:
    engine = SimulatedEngine(SimulatedMachine(kv_tokens=1000, slots=slots), 0.0)
    jobs = sorted(jobs, key=lambda job: job[2])
    now, ended = 0.0, 0
    for prompt, output, at in jobs:
        while (due := engine.next_event()) is not None and due <= at:
            now = due
            ended += len(engine.step(now))
        engine.add_request(request(output, prompt), at)
        assert engine.load(at).running <= slots
        assert 0.0 <= engine.load(at).used <= 1.0
    ended += len(finish(engine, now))
    assert ended == len(jobs)
    assert (engine.used, engine.ongoing) == (0.0, 0)


# ---- a cluster ----


def test_the_same_seed_gives_the_same_run() -> None:
    def visible(run: SimulatedOutcome) -> tuple[object, ...]:
        return run.events, run.latencies, run.per_replica, run.per_evaluator, run.preemptions

    assert visible(outcome(seed=3)) == visible(outcome(seed=3))
    assert visible(outcome(seed=3)) != visible(outcome(seed=4))


def test_sessions_come_home_and_their_prompts_are_cached() -> None:
    roomy = SimulatedMachine(kv_tokens=100_000)
    home = outcome(routing=RoutingConfig(load="requests"), machine=roomy)
    away = outcome(routing=RoutingConfig(sessions=False), machine=roomy)
    assert home.requests == away.requests
    assert home.returned == home.later_turns > 0
    assert away.returned < 0.3 * away.later_turns
    assert home.prefilled < 0.3 * away.prefilled


def test_sessions_that_may_leave_a_full_home_spread_memory_better() -> None:
    stay = outcome(routing=RoutingConfig(load="requests"))
    spill = outcome(routing=RoutingConfig())
    assert spill.later_turns * 0.5 < spill.returned < spill.later_turns
    assert deviation(spill.kv_means) < 0.8 * deviation(stay.kv_means)


def test_a_small_cluster_grows_under_pressure_and_shrinks_again() -> None:
    scaling = ScalingConfig(
        min_replicas=2, max_replicas=16, up_delay_s=5.0, down_delay_s=60.0, look_back_s=10.0
    )
    rush = replace(WORKLOAD, sessions=300, duration_s=30.0, turns=2.0, think_s=200.0)
    run = outcome(1, rush, replicas=2, scaling=scaling, start_s=10.0)
    numbers = [count for _, count in run.replicas_over_time]
    assert numbers[0] == 2
    assert max(numbers) >= 6
    assert numbers[-1] == 2, numbers
    ups = [after > before for before, after in pairwise(numbers)]
    assert sum(a != b for a, b in pairwise(ups)) <= 2, f"no back and forth: {numbers}"
    assert run.requests == outcome(1, rush).requests, "nothing was lost"


def test_histories_are_spread_over_evaluators() -> None:
    seats = [seat_of(f"engine/{i}", 7) for i in range(7000)]
    assert {*seats} == {*range(7)}
    assert imbalance([seats.count(i) for i in range(7)]) < 1.15
