"""Limits of tenants over several replicas (cluster/tenancy/limits.py), with a clock of our own."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from cluster.tenancy.limits import (
    Bucket,
    Ledger,
    Limiter,
    LimitReachedError,
    Limits,
    LocalLedgerClient,
    TenantReport,
    TenantShare,
)

ACME = "acme"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Cluster:
    """Replicas of one ledger; everything in this process."""

    def __init__(self, replicas: int, limits: Limits) -> None:
        self.clock = Clock()
        self.ledger_client = LocalLedgerClient(Ledger(self.clock))
        self.limiters = [Limiter(self.ledger_client, f"r{i}", self.clock) for i in range(replicas)]
        self.limits = limits

    async def admits(self, replica: int) -> bool:
        try:
            await self.limiters[replica].admit(ACME, self.limits)
        except LimitReachedError:
            return False
        return True

    async def report(self) -> None:
        for limiter in self.limiters:
            await limiter.report()


async def refusal(cluster: Cluster, replica: int = 0) -> LimitReachedError:
    with pytest.raises(LimitReachedError) as caught:
        await cluster.limiters[replica].admit(ACME, cluster.limits)
    return caught.value


async def test_requests_at_one_time_are_counted_over_replicas() -> None:
    cluster = Cluster(2, Limits(3, None))
    assert [await cluster.admits(i) for i in (0, 1, 0, 1)] == [True, True, True, False]
    error = await refusal(cluster)
    assert (error.what, error.retry_after_s) == ("requests", 1)
    assert "limit of 3 requests" in str(error)
    cluster.limiters[0].release(ACME)
    assert await cluster.admits(0), "the slot is still this replica's"
    cluster.limiters[0].release(ACME)
    assert not await cluster.admits(1), "for a second the other one holds it"
    await cluster.report()
    assert await cluster.admits(1)


async def test_other_tenants_have_limits_of_their_own() -> None:
    cluster = Cluster(1, Limits(1, None))
    assert await cluster.admits(0)
    assert not await cluster.admits(0)
    await cluster.limiters[0].admit("umbrella", Limits(1, None))


async def test_without_limits_nothing_is_refused() -> None:
    cluster = Cluster(1, Limits(None, None))
    assert all([await cluster.admits(0) for _ in range(500)])


async def test_tokens_are_paid_afterwards() -> None:
    cluster = Cluster(2, Limits(None, 600))
    assert await cluster.admits(0)
    cluster.limiters[0].spend(ACME, 650)
    error = await refusal(cluster)
    assert (error.what, error.retry_after_s) == ("tokens", 5), "a debt of 50 at 10 a second"
    await cluster.report()
    assert not await cluster.admits(1), "the other replica knows"
    cluster.clock.now += 5.1
    await cluster.report()
    assert await cluster.admits(0)
    assert await cluster.admits(1)


async def test_lowered_limits_hold_at_once() -> None:
    cluster = Cluster(1, Limits(3, None))
    assert all([await cluster.admits(0) for _ in range(2)])
    cluster.limits = Limits(1, None)
    assert not await cluster.admits(0)
    cluster.limits = Limits(None, None)
    assert await cluster.admits(0)


async def test_many_that_wait_ask_together() -> None:
    calls: list[int] = []

    class SlowLedgerClient(LocalLedgerClient):
        async def settle(
            self, replica: str, reports: Mapping[str, TenantReport]
        ) -> dict[str, TenantShare]:
            calls.append(reports[ACME].wanted)
            await asyncio.sleep(0.001)
            return await super().settle(replica, reports)

    limiter = Limiter(SlowLedgerClient(Ledger()), "r0")
    answers = await asyncio.gather(
        *(limiter.admit(ACME, Limits(100, None)) for _ in range(150)), return_exceptions=True
    )
    assert sum(answer is None for answer in answers) == 100
    assert len(calls) <= 2
    assert sum(calls) >= 150


async def test_a_replica_without_ledger_enforces_the_limits_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Broken:
        async def settle(
            self, replica: str, reports: Mapping[str, TenantReport]
        ) -> dict[str, TenantShare]:
            raise ConnectionError("no ledger")

    limiter = Limiter(Broken(), "r0", Clock())
    for _ in range(2):
        await limiter.admit(ACME, Limits(2, 100))
    with pytest.raises(LimitReachedError, match="2 requests"):
        await limiter.admit(ACME, Limits(2, 100))
    assert limiter.desk_faults >= 2
    assert caplog.text.count("alone") == 1, "each is counted, the first is told"
    limiter.release(ACME)
    limiter.spend(ACME, 200)
    with pytest.raises(LimitReachedError, match="100 tokens"):
        await limiter.admit(ACME, Limits(2, 100))


async def test_a_dead_replica_is_forgotten() -> None:
    cluster = Cluster(2, Limits(1, None))
    assert await cluster.admits(0)
    for _ in range(12):
        cluster.clock.now += 1.0
        await cluster.limiters[1].report()
    assert await cluster.admits(1)


async def test_a_lost_ledger_learns_what_is_in_use() -> None:
    cluster = Cluster(2, Limits(2, 60))
    assert await cluster.admits(0)
    cluster.limiters[0].spend(ACME, 50)
    await cluster.report()
    fresh = LocalLedgerClient(Ledger(cluster.clock))
    for limiter in cluster.limiters:
        limiter._ledger = fresh
    cluster.limiters[0].spend(ACME, 1)
    await cluster.report()
    assert await cluster.admits(1)
    assert not await cluster.admits(1)
    share = await fresh.settle("r9", {ACME: TenantReport(cluster.limits, 0, 0, 0, 0)})
    assert share[ACME].balance == 59, "what the old one knew is not paid twice"


def test_a_report_that_comes_twice_is_paid_once() -> None:
    ledger = Ledger(Clock())
    report = TenantReport(Limits(4, 600), 1, 1, 100, 0)
    assert ledger.settle("r0", {ACME: report}) == {ACME: TenantShare(2, 500.0)}
    assert ledger.settle("r0", {ACME: report}) == {ACME: TenantShare(2, 500.0)}


class Limited(RuleBasedStateMachine):
    """Anything that replicas may do, in any order; also answers of the ledger that are lost."""

    @initialize(
        replicas=st.integers(1, 4), requests=st.integers(1, 6), rate=st.sampled_from([60, 6000])
    )
    def start(self, replicas: int, requests: int, rate: int) -> None:
        self.cluster = Cluster(replicas, Limits(requests, rate))
        self.running = [0] * replicas
        self.began = self.cluster.clock.now
        self.spent = 0

    @rule(which=st.integers(0, 3))
    def come(self, which: int) -> None:
        replica = which % len(self.running)
        before = sum(self.running)
        if asyncio.run(self.cluster.admits(replica)):
            assert before < (self.cluster.limits.requests or 0)
            self.running[replica] += 1

    @rule(which=st.integers(0, 3), tokens=st.integers(1, 40))
    def spend(self, which: int, tokens: int) -> None:
        replica = which % len(self.running)
        if self.running[replica]:
            self.cluster.limiters[replica].spend(ACME, tokens)
            self.spent += tokens

    @rule(which=st.integers(0, 3))
    def leave(self, which: int) -> None:
        replica = which % len(self.running)
        if self.running[replica]:
            self.cluster.limiters[replica].release(ACME)
            self.running[replica] -= 1

    @rule(seconds=st.sampled_from([0.1, 1.0]))
    def wait(self, seconds: float) -> None:
        # A second in which nobody reports would make replicas count as dead.
        self.cluster.clock.now += seconds
        asyncio.run(self.cluster.report())

    @invariant()
    def never_more_than_the_limit(self) -> None:
        if hasattr(self, "cluster"):
            assert sum(self.running) <= (self.cluster.limits.requests or 0)

    def teardown(self) -> None:
        """When all is quiet, exactly the limit is to be had, and exactly the tokens left."""
        if not hasattr(self, "cluster"):
            return
        for replica, running in enumerate(self.running):
            for _ in range(running):
                self.cluster.limiters[replica].release(ACME)
        asyncio.run(self.cluster.report())
        rate = self.cluster.limits.tokens_per_minute or 0
        asked = {ACME: TenantReport(self.cluster.limits, 0, 0, 0, 0)}
        balance = asyncio.run(self.cluster.ledger_client.settle("auditor", asked))[ACME].balance
        flown = (self.cluster.clock.now - self.began) * rate / 60
        assert rate - self.spent <= balance + 1e-6, "nothing is paid twice"
        assert balance <= min(rate, rate - self.spent + flown) + 1e-6, "nothing is forgotten"
        self.cluster.clock.now += 6000
        asyncio.run(self.cluster.report())
        admitted = 0
        while asyncio.run(self.cluster.admits(admitted % len(self.running))):
            admitted += 1
        assert admitted == self.cluster.limits.requests


def test_the_limits_hold_whatever_happens() -> None:
    run_state_machine_as_test(Limited)


@given(
    rate=st.integers(1, 10_000),
    moves=st.lists(st.tuples(st.floats(0, 100), st.integers(0, 5000)), max_size=40),
)
def test_whoever_spends_only_above_zero_gets_the_rate_a_minute_and_one_request(
    rate: int, moves: list[tuple[float, int]]
) -> None:
    now, spent, largest = 0.0, 0, 0
    bucket = Bucket(rate, now)
    for seconds, tokens in moves:
        now += seconds
        if bucket.balance(now) > 0:
            bucket.spend(tokens, now)
            spent += tokens
            largest = max(largest, tokens)
        assert spent <= rate + rate * now / 60 + largest + 1e-6


@pytest.mark.parametrize("broken", ["requests", "tokens"])
async def test_the_checks_can_fail(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: without the ledger's sums, replicas together exceed the limits."""
    cluster = Cluster(2, Limits(1, 60))
    if broken == "requests":
        cluster.limiters[1]._ledger = LocalLedgerClient(Ledger(cluster.clock))
        assert await cluster.admits(0)
        assert await cluster.admits(1)
    else:
        monkeypatch.setattr(Bucket, "spend", lambda self, tokens, now: None)
        assert await cluster.admits(0)
        cluster.limiters[0].spend(ACME, 100)
        cluster.limiters[0].release(ACME)
        await cluster.report()
        assert await cluster.admits(0)
