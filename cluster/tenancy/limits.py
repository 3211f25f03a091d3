"""Limits of tenants that hold for all replicas together.

Two limits: requests at one time, and tokens a minute. A :class:`Ledger` knows what all replicas do.
Every replica has a :class:`Limiter`, which keeps *slots* that the ledger has granted to it: while
a slot is free, a request is admitted without asking anybody. The ledger is asked when slots run
out, and told every second what was used; slots that are free then go back.

What is promised:

- Requests at one time never exceed the limit. Slots that another replica holds unused make a
  refusal too early, for at most a second (:data:`REPORT_S`). This holds except after a limit was
  lowered, after the ledger was lost (a second), and while it can't be reached: then every replica
  enforces the whole limit by itself, and counts that.
- Tokens are paid after they are used: a request is admitted while the balance is above zero, and
  runs to its end. So a tenant gets, in any time, at most what the rate allows, a minute's worth,
  and what the requests admitted before the balance fell to zero go on to use. The debt is paid off
  before anything else is admitted. What replicas use reaches the ledger within a second.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

logger = logging.getLogger(__name__)

REPORT_S = 1.0
"""Seconds between two reports of a replica."""
_SILENT_S = 10.0  # after so long a replica that does not report holds nothing any more
_STALE_S = 3.0  # so old may a balance be on which a request is admitted or refused
_IDLE_S = 120.0  # so long a limiter remembers a tenant that does nothing

Clock = Callable[[], float]


class Limits(NamedTuple):
    """What a tenant may use; None is no limit."""

    requests: int | None
    """At one time."""
    tokens_per_minute: int | None


class TenantReport(NamedTuple):
    """What one replica says of one tenant."""

    limits: Limits
    in_use: int
    """Requests under way."""
    wanted: int
    """Further requests that wait for a slot."""
    spent: int
    """Tokens used since the replica started."""
    told: int
    """Of these, tokens that the ledger has confirmed."""


class TenantShare(NamedTuple):
    """The ledger's answer."""

    slots: int
    """Requests that the replica may have under way."""
    balance: float
    """Tokens that the tenant may still use, over all replicas; negative is debt."""


class LimitReachedError(Exception):
    """A tenant is at its limit."""

    def __init__(self, what: Literal["requests", "tokens"], limit: int, retry_after_s: int) -> None:
        unit = "requests at one time" if what == "requests" else "tokens a minute"
        super().__init__(f"the limit of {limit} {unit} is reached; try again in {retry_after_s} s")
        self.what: Literal["requests", "tokens"] = what
        self.retry_after_s = retry_after_s


class Bucket:
    """Tokens that flow in at a rate and are spent in any amount; at most a minute's worth."""

    def __init__(self, per_minute: int, now: float) -> None:
        """Start full."""
        self._per_minute = per_minute
        self._balance = float(per_minute)
        self._at = now

    def balance(self, now: float) -> float:
        """Tokens left; negative is debt."""
        flown = max(0.0, now - self._at) * self._per_minute / 60.0
        self._balance = min(float(self._per_minute), self._balance + flown)
        self._at = max(self._at, now)
        return self._balance

    def spend(self, tokens: int, now: float) -> None:
        """Take out tokens that were used, whether they are there or not."""
        self._balance = self.balance(now) - tokens

    def resize(self, per_minute: int, now: float) -> None:
        """Change the rate from now on; debt stays."""
        self.balance(now)
        self._per_minute = per_minute
        self._balance = min(self._balance, float(per_minute))


@dataclass(slots=True)
class _Holding:
    """What a replica has of a tenant, as the ledger knows it."""

    slots: int
    spent: int
    at: float


@dataclass(slots=True)
class _Account:
    """One tenant, as the ledger knows it."""

    holdings: dict[str, _Holding] = field(default_factory=dict)
    bucket: Bucket | None = None


class Ledger:
    """What all replicas use of every tenant's limits. Pure: it knows no network and no threads."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        """Start with nothing in use."""
        self._clock = clock
        self._accounts: dict[str, _Account] = {}

    def settle(self, replica: str, reports: Mapping[str, TenantReport]) -> dict[str, TenantShare]:
        """Take one replica's reports, and say what it may use.

        A report replaces the replica's earlier one, and amounts are totals: one that was lost, or
        came twice, does no harm.

        Args:
            replica: the replica's id.
            reports: tenant to report.
        """
        now = self._clock()
        return {tenant: self._settle(replica, tenant, r, now) for tenant, r in reports.items()}

    def _settle(self, replica: str, tenant: str, report: TenantReport, now: float) -> TenantShare:
        account = self._accounts.setdefault(tenant, _Account())
        account.holdings = {
            name: holding
            for name, holding in account.holdings.items()
            if now - holding.at < _SILENT_S
        }
        before = account.holdings.get(replica)
        known = report.told if before is None else before.spent
        balance = self._spend(account, report, max(0, report.spent - known), now)
        slots = report.in_use + report.wanted
        if report.limits.requests is not None:
            others = sum(h.slots for name, h in account.holdings.items() if name != replica)
            slots = max(report.in_use, min(slots, report.limits.requests - others))
        account.holdings[replica] = _Holding(slots, report.spent, now)
        return TenantShare(slots, balance)

    @staticmethod
    def _spend(account: _Account, report: TenantReport, tokens: int, now: float) -> float:
        rate = report.limits.tokens_per_minute
        if rate is None:
            account.bucket = None
            return math.inf
        if account.bucket is None:
            account.bucket = Bucket(rate, now)
        account.bucket.resize(rate, now)
        account.bucket.spend(tokens, now)
        return account.bucket.balance(now)


class LedgerClient(Protocol):
    """A way to the ledger."""

    async def settle(
        self, replica: str, reports: Mapping[str, TenantReport]
    ) -> dict[str, TenantShare]:
        """See :meth:`Ledger.settle`. May raise anything: the ledger then counts as lost."""
        ...


class LocalLedgerClient:
    """A ledger in this process: for one replica, and for one that lost the way to the others."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    async def settle(
        self, replica: str, reports: Mapping[str, TenantReport]
    ) -> dict[str, TenantShare]:
        """See :meth:`LedgerClient.settle`."""
        return self._ledger.settle(replica, reports)


@dataclass(slots=True)
class _State:
    """One tenant on this replica."""

    limits: Limits
    in_use: int = 0
    waiting: int = 0
    slots: int = 0
    spent: int = 0
    told: int = 0
    balance: float = 0.0  # after the last answer, which knew of `balanced` tokens
    balanced: int = 0
    answered_at: float = -math.inf
    used_at: float = 0.0

    @property
    def left(self) -> float:
        """Tokens left, as far as this replica knows."""
        return self.balance - (self.spent - self.balanced)


class Limiter:
    """Admits the requests of one replica. For one event loop."""

    def __init__(
        self, ledger_client: LedgerClient, replica: str, clock: Clock = time.monotonic
    ) -> None:
        """Make a limiter.

        Args:
            ledger_client: the way to the ledger.
            replica: this replica's id, another one after every restart.
            clock: seconds.
        """
        self._ledger = ledger_client
        self._alone = LocalLedgerClient(Ledger(clock))
        self._replica = replica
        self._clock = clock
        self._states: dict[str, _State] = {}
        # One call at a time: the ledger sees reports in the order in which they were true.
        self._lock = asyncio.Lock()
        self._started = 0
        self._reached = True  # the last call
        self.desk_faults = 0
        """Calls for which the ledger could not be reached."""

    async def admit(self, tenant: str, limits: Limits) -> None:
        """Count a request in; :meth:`release` must follow.

        Raises:
            LimitReachedError: it may not run now.
        """
        state = self._state(tenant, limits)
        if self._knows_enough(state):
            self._require_balance(state)
            state.in_use += 1
            return
        started = self._started
        state.waiting += 1
        try:
            async with self._lock:
                # A call that began after this request came has asked for it, too.
                if self._started == started:
                    await self._settle([t for t, s in self._states.items() if s.waiting])
            self._require_balance(state)
            if limits.requests is not None and state.in_use >= state.slots:
                raise LimitReachedError("requests", limits.requests, math.ceil(REPORT_S))
            state.in_use += 1
        finally:
            state.waiting -= 1

    def release(self, tenant: str) -> None:
        """Count a request out."""
        self._states[tenant].in_use -= 1

    def spend(self, tenant: str, tokens: int) -> None:
        """Tokens that a request of the tenant, counted in, has used."""
        state = self._states[tenant]
        state.spent += tokens
        state.used_at = self._clock()

    async def report(self) -> None:
        """Tell the ledger what was used, and give free slots back. Every :data:`REPORT_S`."""
        async with self._lock:
            now = self._clock()
            for tenant, state in list(self._states.items()):
                busy = state.in_use or state.waiting or state.spent > state.told
                if not busy and now - state.used_at > _IDLE_S:
                    del self._states[tenant]
            await self._settle(list(self._states))

    def _state(self, tenant: str, limits: Limits) -> _State:
        state = self._states.get(tenant)
        if state is None:
            state = self._states[tenant] = _State(limits)
        elif state.limits != limits:
            state.limits = limits
            state.answered_at = -math.inf  # ask before anything is admitted under new limits
        state.used_at = self._clock()
        return state

    def _knows_enough(self, state: _State) -> bool:
        """Whether a request can be judged without asking the ledger."""
        if state.limits == Limits(None, None):
            return True
        free = state.limits.requests is None or state.in_use + state.waiting < state.slots
        return free and self._clock() - state.answered_at < _STALE_S

    @staticmethod
    def _require_balance(state: _State) -> None:
        rate = state.limits.tokens_per_minute
        if rate is not None and state.left <= 0:
            seconds = max(1, math.ceil(-state.left * 60.0 / rate))
            raise LimitReachedError("tokens", rate, seconds)

    async def _settle(self, tenants: list[str]) -> None:
        if not tenants:
            return
        self._started += 1
        reports: dict[str, TenantReport] = {}
        for tenant in tenants:
            state = self._states[tenant]
            state.slots = state.in_use  # free slots are given up before the ledger hears of it
            reports[tenant] = TenantReport(
                state.limits, state.in_use, state.waiting, state.spent, state.told
            )
        try:
            shares, reached = await self._ledger.settle(self._replica, reports), True
        except Exception as error:
            self.desk_faults += 1
            if self._reached:
                logger.warning("tenants' limits are enforced by this replica alone: %r", error)
            shares, reached = await self._alone.settle(self._replica, reports), False
        if reached and not self._reached:
            logger.info("tenants' limits are enforced over all replicas again")
        self._reached = reached
        for tenant, share in shares.items():
            state, report = self._states[tenant], reports[tenant]
            state.slots, state.balance = share
            state.balanced = report.spent
            state.answered_at = self._clock()
            if reached:
                state.told = report.spent
