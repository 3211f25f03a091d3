"""Where the samples of all replicas come together: one small deployment."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.config import PageConfig
from cluster.dashboard.records import BlockTrace, ReplicaReport, ReplicaSample, Wishes
from cluster.telemetry.serve_logs import log_no_calls

_SILENT_INTERVALS = 5.0  # without a report: the replica is shown as silent
_TRACE_WAIT_S = 10.0


@dataclass
class _Replica:
    latest: ReplicaReport
    heard: float  # the board's clock, seconds
    samples: deque[tuple[int, ReplicaSample]]  # with the number under which each came


@dataclass
class _Wanted:
    """A trace that a browser waits for."""

    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    waiting: int = 0
    trace: BlockTrace | None = None


class DashboardHub:
    """Remembers ``page.minutes`` of every replica. Ray Serve runs it as one replica of its own.

    Replicas call it, never the other way round: it needs to know nobody, and one that is gone is
    simply not heard of any more. Requests for traces ride on the answers to reports.
    """

    def __init__(self, config: PageConfig, clock: Callable[[], float] = time.monotonic) -> None:
        log_no_calls()
        self._config = config
        self._clock = clock
        self._id = uuid.uuid4().hex  # browsers notice a new board by it
        self._number = 0
        self._replicas: dict[str, _Replica] = {}
        self._wanted: dict[tuple[str, str], _Wanted] = {}
        self._to_go_on: set[str] = set()

    async def report(self, report: ReplicaReport) -> Wishes:
        """Take a replica's report; returns what is wanted of it."""
        kept = int(self._config.minutes * 60 / self._config.interval_s) + 1
        replica = self._replicas.get(report.replica)
        if replica is None:
            replica = _Replica(report, 0.0, deque(maxlen=kept))
            self._replicas[report.replica] = replica
        replica.latest, replica.heard = report, self._clock()
        for sample in report.samples:
            self._number += 1
            replica.samples.append((self._number, sample))
        self._forget_the_silent()
        go_on = report.replica in self._to_go_on
        self._to_go_on.discard(report.replica)
        return Wishes([r for name, r in self._wanted if name == report.replica], go_on)

    async def let_go_on(self, replica: str) -> bool:
        """Tell a replica, at its next report, to end a stop of its guard on quality.

        Returns:
            False if there is no such replica, or its guard has not stopped it.
        """
        known = self._replicas.get(replica)
        if known is None or known.latest.guard is None or not known.latest.guard.stopped:
            return False
        self._to_go_on.add(replica)
        return True

    async def deliver(self, replica: str, request: str, trace: BlockTrace | None) -> None:
        """Take a trace that was wanted; None if the replica does not know the request."""
        wanted = self._wanted.pop((replica, request), None)
        if wanted is not None:
            wanted.trace = trace
            wanted.arrived.set()

    async def state(self, board: str, after: int) -> dict[str, object]:
        """What a browser does not know yet, as JSON values.

        Args:
            board: the id of the board that told it what it knows.
            after: ``number`` of the last answer.
        """
        if board != self._id:
            after = 0
        now = self._clock()
        silent_after = _SILENT_INTERVALS * self._config.interval_s
        return {
            "board": self._id,
            "number": self._number,
            "interval_s": self._config.interval_s,
            "minutes": self._config.minutes,
            "fields": ReplicaSample._fields,
            "replicas": [
                {
                    "id": name,
                    "node": replica.latest.node,
                    "started": replica.latest.started,
                    "silent_s": round(now - replica.heard, 1)
                    if now - replica.heard > silent_after
                    else 0,
                    "blocks": replica.latest.blocks,
                    "kinds": replica.latest.kinds,
                    "requests": replica.latest.requests,
                    "ended": replica.latest.ended,
                    "adapters": {n: a._asdict() for n, a in replica.latest.adapters.items()},
                    "experts": {n: e._asdict() for n, e in replica.latest.experts.items()},
                    "guard": replica.latest.guard and replica.latest.guard._asdict(),
                    "samples": [s for number, s in replica.samples if number > after],
                }
                for name, replica in sorted(
                    self._replicas.items(), key=lambda item: (item[1].latest.started, item[0])
                )
            ],
        }

    async def trace(self, replica: str, request: str) -> BlockTrace | None:
        """The trace of a request; None if its replica does not know it, or does not answer."""
        if replica not in self._replicas:
            return None
        wanted = self._wanted.setdefault((replica, request), _Wanted())
        wanted.waiting += 1
        try:
            await asyncio.wait_for(wanted.arrived.wait(), _TRACE_WAIT_S)
        except TimeoutError:
            return None
        finally:
            wanted.waiting -= 1
            if not wanted.waiting and self._wanted.get((replica, request)) is wanted:
                del self._wanted[replica, request]
        return wanted.trace

    def _forget_the_silent(self) -> None:
        oldest = self._clock() - self._config.minutes * 60
        for name in [n for n, r in self._replicas.items() if r.heard < oldest]:
            del self._replicas[name]
            self._to_go_on.discard(name)
