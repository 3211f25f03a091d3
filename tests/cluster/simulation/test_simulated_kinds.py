"""Kinds of requests on a simulated mixture of experts."""

from __future__ import annotations

from itertools import product

import pytest

from cluster.config import RoutingConfig
from cluster.simulation.engine import (
    ExpertMix,
    SimulatedEngine,
    SimulatedMachine,
    SimulatedRequest,
)
from cluster.simulation.world import ChatWorkload, Cluster, SimulatedOutcome, World, imbalance


def kind(own: range, experts: int = 16, share: float = 0.9) -> tuple[tuple[float, ...], ...]:
    """One layer, two experts of sixteen for each token, most of them the kind's own."""
    rest = experts - len(own)
    return (
        tuple(2 * (share / len(own) if e in own else (1 - share) / rest) for e in range(experts)),
    )


APART = ExpertMix((kind(range(8)), kind(range(8, 16))), step_s=0.0008)
ALIKE = ExpertMix((((0.125,) * 16,),) * 2, step_s=0.0008)


def run(mix: ExpertMix, kinds: bool, sessions: bool, replicas: int = 4) -> SimulatedOutcome:
    machine = SimulatedMachine(kv_tokens=60_000, step_s=0.004, experts=mix)
    workload = ChatWorkload(
        450 * replicas, 900.0, output=400, longest=4096, kinds=(0.5, 0.5), has_sessions=sessions
    )
    routing = RoutingConfig(sessions=sessions, kinds=kinds)
    return World(Cluster(replicas, routing=routing, machine=machine), workload).run()


def test_distinct_experts_are_counted_as_chance_has_it() -> None:
    mix = ExpertMix((((0.5, 0.25),), ((0.0, 1.0),)))
    expected = 0.0
    for first, second in product((0, 1), repeat=2):  # two requests of the first kind, expert 0
        expected += 0.25 * bool(first + second)
    assert mix.distinct((2, 0)) == pytest.approx(expected + 1 - 0.75**2)
    assert mix.distinct((2, 1)) == pytest.approx(expected + 1)
    assert mix.distinct((0, 0)) == 0


def test_a_step_takes_time_for_each_distinct_expert() -> None:
    took = []
    for second in (0, 1):  # of which kind the second request is
        machine = SimulatedMachine(step_per_request_s=0.0, prefill_per_s=1e9, experts=APART)
        engine = SimulatedEngine(machine, 0.0)
        for of_kind in (0, second):
            engine.add_request(SimulatedRequest(0, 1, 0, 100, 0.0, kind=of_kind), 0.0)
        due = engine.next_event()
        assert due is not None
        took.append(due)
        assert len(engine.step(due)) == 2
        assert engine.steps == pytest.approx(100)
        assert due == pytest.approx(100 * 0.015 + 0.0008 * engine.distinct, abs=1e-6)
    assert took[0] < took[1]


@pytest.mark.parametrize("sessions", [False, True])
def test_kinds_that_meet_touch_fewer_experts_at_no_ones_cost(sessions: bool) -> None:
    blind, kinds = (run(APART, kinds, sessions) for kinds in (False, True))
    assert kinds.distinct / kinds.steps < 0.87 * blind.distinct / blind.steps
    assert imbalance(kinds.kv_means) < 1.3
    assert kinds.first_token(0.5) <= blind.first_token(0.5)
    assert kinds.first_token(0.99) <= blind.first_token(0.99)
    blind, kinds = (run(ALIKE, kinds, sessions) for kinds in (False, True))
    assert kinds.distinct / kinds.steps > 0.9 * blind.distinct / blind.steps, "negative control"
