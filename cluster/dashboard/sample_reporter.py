"""The replica's side of the page: tells the board what its engine does."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from ray.serve.handle import DeploymentHandle

from cluster.dashboard.engine_sampler import EngineSampler

logger = logging.getLogger(__name__)

_TIMEOUT_S = 10.0  # for the board to take a report

CountFault = Callable[[str], None]


class SampleReporter:
    """Samples and reports, once in an interval, until it is stopped."""

    def __init__(
        self,
        watch: EngineSampler,
        board: DeploymentHandle[Any],
        interval_s: float,
        count_fault: CountFault,
        let_go_on: Callable[[], None] = lambda: None,
    ) -> None:
        """Be ready to start.

        Args:
            watch: takes the samples.
            board: the :class:`~cluster.dashboard.hub.DashboardHub`.
            interval_s: seconds between two reports.
            count_fault: called with the part of the page that failed.
            let_go_on: called when an operator ends a stop of the guard on quality.
        """
        self._watch = watch
        self._let_go_on = let_go_on
        self._board = board
        self._interval_s = interval_s
        self._count_fault = count_fault
        self._sound = True  # whether the last report arrived: one line a change, not one a second
        self._task: asyncio.Task[None] | None = None
        self._deliveries: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Begin; to be called on the event loop."""
        self._task = asyncio.create_task(self._run())

    def stop(self) -> None:
        """End. Idempotent."""
        for task in (self._task, *self._deliveries):
            if task is not None:
                task.cancel()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            try:
                self._watch.sample()
                report = self._watch.report()
                wishes = await asyncio.wait_for(self._board.report.remote(report), _TIMEOUT_S)
                self._watch.sent(report)
                self._sound = True
            except Exception as error:  # the board is away, say; samples wait for it
                self._note("report", error)
                continue
            if wishes.go_on:
                self._let_go_on()
            for request in wishes.traces:
                delivery = asyncio.create_task(self._deliver(report.replica, request))
                self._deliveries.add(delivery)
                delivery.add_done_callback(self._deliveries.discard)

    async def _deliver(self, replica: str, request: str) -> None:
        try:
            trace = await self._watch.trace(request)
            await asyncio.wait_for(self._board.deliver.remote(replica, request, trace), _TIMEOUT_S)
        except Exception as error:
            self._note("trace", error)

    def _note(self, part: str, error: Exception) -> None:
        self._count_fault(part)
        if self._sound:
            self._sound = False
            logger.warning("live page: %s failed, and is counted from now on: %r", part, error)
