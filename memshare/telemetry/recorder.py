"""Record what happened: transitions are counted, explained and, if configured, logged as events."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from memshare.config import MemShareConfig
from memshare.telemetry.event_log import EventKind, EventLog, EventValue
from memshare.telemetry.explain import Explainer
from memshare.telemetry.stats import Counters, Payload, PreemptionNote

if TYPE_CHECKING:
    from memshare.core.requests import RequestState


class Recorder:
    """Counters, explanations and event log of one engine.

    Attributes:
        step: the engine step that is being scheduled, counted from 1.
        logs_events: whether :meth:`event` does anything; for callers whose fields cost time.
    """

    def __init__(self, config: MemShareConfig) -> None:
        event_log = config.event_log
        self.counters = Counters()
        self.explainer = Explainer(config.logs)
        self.step = 0
        self.logs_events = event_log is not None
        self._events = EventLog(event_log) if event_log is not None else None

    def event(self, kind: EventKind, **fields: EventValue) -> None:
        """Log a transition with the engine step in which it happened."""
        if self._events is not None:
            self._events.record(kind, step=self.step, **fields)

    def preempted(self, state: RequestState) -> None:
        """vLLM has taken the request's blocks."""
        request = state.request_id
        self.counters.add("preemptions")
        self.counters.note_preemption(PreemptionNote(time.time(), request, state.full))
        self.explainer.preempted(request, state.full)
        self.event(
            "preempted", request=request, shared=len(state.repointed), dropped=len(state.holes)
        )

    def take_stats(self, gauges: dict[str, float]) -> Payload | None:
        """What has changed since the last call; None if nothing has."""
        if self._events is not None and (lost := self._events.take_dropped()):
            self.counters.add("events_dropped", lost)
        return self.counters.take(gauges)

    def close(self) -> None:
        """Write what is waiting. Idempotent."""
        if self._events is not None:
            self._events.close()
