"""What a guard does with answers (cluster/guard/guard.py); the exact model is made up here."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from cluster.guard.config import GuardConfig
from cluster.guard.guard import Guard
from memshare.telemetry.replica_metrics import REPLICA


@dataclass(frozen=True)
class Written:
    """An answer."""

    prompt: Sequence[int] = (1, 2, 3)
    served: Sequence[float] = (-0.1, -0.2)


class Metrics:
    """What was counted and shown; refuses what does not exist."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, ...]] = Counter()
        self.shown: dict[tuple[str, ...], float] = {}

    def count(self, name: str, *values: str, by: int = 1) -> None:
        self._check(name, "counter", values)
        self.counts[name, *values] += by

    def show(self, name: str, *values: str, value: float) -> None:
        self._check(name, "gauge", values)
        self.shown[name, *values] = value

    def _check(self, name: str, kind: str, values: tuple[str, ...]) -> None:
        metric = REPLICA[name]
        assert metric.kind == kind
        for label, value in zip(metric.labels, values, strict=True):
            assert value in label.values


async def same(answer: Written) -> Sequence[float]:
    return answer.served


async def other(answer: Written) -> Sequence[float]:
    return [-9.0] * len(answer.served)


@asynccontextmanager
async def guarding(
    score: Callable[[Written], object] = same,
    is_quiet: Callable[[float], bool] = lambda most: True,
    **fields: object,
) -> AsyncIterator[tuple[Guard[Written], Metrics]]:
    metrics = Metrics()
    config = GuardConfig.model_validate({"share": 1.0, **fields})
    guard = Guard(config, score, is_quiet, metrics, random.Random(0))  # type: ignore[arg-type]
    guard.start()
    try:
        yield guard, metrics
    finally:
        guard.close()


async def until(holds: Callable[[], bool], timeout_s: float = 20.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not holds():
            await asyncio.sleep(0.005)


async def test_a_good_engine_is_left_alone() -> None:
    async with guarding() as (guard, metrics):
        for _ in range(60):
            guard.take(Written())
            await asyncio.sleep(0)
        await until(lambda: metrics.counts["guard_shadows", "scored"] == 60)
        state = guard.state()
        assert (state.mean, state.shadows, state.alarms, state.stopped) == (0.0, 60, 0, False)
        assert state.high < 0.12, "60 shadows without a difference bound what there may be"
        assert metrics.counts["guard_tokens",] == 60 * 5, "prompt and answer of each"
        assert metrics.shown["guard_stopped",] == 0


async def test_a_bad_one_is_stopped_within_ten_shadows_until_an_operator_comes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with guarding(other) as (guard, metrics):
        for _ in range(10):
            guard.take(Written())
        await until(lambda: guard.stopped)
        assert metrics.counts["guard_alarms",] == 1
        assert metrics.shown["guard_stopped",] == 1
        assert metrics.shown["guard_disagreement", "low"] > 0.1
        (line,) = [r for r in caplog.records if getattr(r, "event", "") == "guard_alarm"]
        assert "new requests run exact" in line.message
        outcomes = ("scored", "dropped")
        assert sum(metrics.counts["guard_shadows", o] for o in outcomes) == 10
        dropped = metrics.counts["guard_shadows", "dropped"]
        guard.take(Written())
        assert metrics.counts["guard_shadows", "dropped"] == dropped + 1, "it has been proved"
        guard.let_go_on("operator")
        assert not guard.stopped
        assert metrics.counts["guard_resumes", "operator"] == 1
        assert guard.state().high == 1.0, "nothing is known of what comes now"
        guard.let_go_on("operator")
        assert metrics.counts["guard_resumes", "operator"] == 1, "only a stop can end"


async def test_a_stop_cools_down_and_a_second_one_follows_if_nothing_has_changed() -> None:
    async with guarding(other, cool_down_s=0.05) as (guard, metrics):
        for alarms in (1, 2):
            for _ in range(12):
                guard.take(Written())
            await until(lambda alarms=alarms: metrics.counts["guard_alarms",] == alarms)
            await until(lambda: not guard.stopped)
        assert metrics.counts["guard_resumes", "cool_down"] == 2


async def test_a_guard_that_only_reports_stops_nothing() -> None:
    async with guarding(other, on_alarm="report") as (guard, metrics):
        for _ in range(40):
            guard.take(Written())
        await until(lambda: metrics.counts["guard_shadows", "scored"] == 40)
        assert not guard.stopped
        assert metrics.counts["guard_alarms",] > 1, "each is proved anew"


async def test_shadows_wait_for_a_quiet_moment_but_not_for_ever() -> None:
    async with guarding(is_quiet=lambda most: False, patience_s=0.1) as (guard, metrics):
        guard.take(Written())
        await asyncio.sleep(0.05)
        assert not metrics.counts
        await until(lambda: metrics.counts["guard_shadows", "scored"] == 1)


async def test_no_more_run_or_wait_than_may() -> None:
    running = most = 0
    done = asyncio.Event()

    async def slow(answer: Written) -> Sequence[float]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await done.wait()
        running -= 1
        return answer.served

    async with guarding(slow, concurrent=2, waiting=3) as (guard, metrics):
        for _ in range(9):
            guard.take(Written())
            await asyncio.sleep(0.001)
        assert metrics.counts["guard_shadows", "dropped"] == 9 - 2 - 3
        done.set()
        await until(lambda: metrics.counts["guard_shadows", "scored"] == 5)
        assert most == 2


async def test_shutdown_drops_what_waits_and_what_runs() -> None:
    cancelled = asyncio.Event()

    async def endless(answer: Written) -> Sequence[float]:
        try:
            await asyncio.sleep(3600)
        finally:
            cancelled.set()
        return ()

    async with guarding(endless) as (guard, metrics):
        for _ in range(3):
            guard.take(Written())
        await asyncio.sleep(0.01)
        guard.close()
        await until(cancelled.is_set)
        await until(lambda: metrics.counts["guard_shadows", "dropped"] == 3)
        assert not guard.chooses()
        guard.take(Written())
        assert metrics.counts["guard_shadows", "dropped"] == 4


async def test_a_shadow_that_fails_is_counted_and_the_next_one_runs() -> None:
    first = True

    async def unsteady(answer: Written) -> Sequence[float]:
        nonlocal first
        if first:
            first = False
            raise RuntimeError("no")
        return answer.served

    async with guarding(unsteady) as (guard, metrics):
        guard.take(Written())
        guard.take(Written())
        await until(lambda: metrics.counts["guard_shadows", "scored"] == 1)
        assert metrics.counts["guard_shadows", "failed"] == 1


async def test_what_stayed_exact_needs_no_shadow() -> None:
    async with guarding() as (guard, metrics):
        guard.take("untouched")
        guard.take("unscorable")
        assert metrics.counts["guard_shadows", "untouched"] == 1
        assert metrics.counts["guard_shadows", "unscorable"] == 1
        assert guard.state().shadows == 0


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"share": 0.0}, "share"),
        ({"bound": 1.0}, "bound"),
        ({"false_alarm_rate": 0.5}, "false_alarm_rate"),
        ({"on_alarm": "report", "cool_down_s": 60}, "has no effect with on_alarm 'report'"),
        ({"windw": 5}, "windw"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        GuardConfig.model_validate(fields)
