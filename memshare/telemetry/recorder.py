"""Saying what happened: transitions are counted, explained and, if asked, logged as events."""

from __future__ import annotations

import time

from memshare.config import MemShareConfig
from memshare.core.requests import Candidate, RequestState
from memshare.telemetry.event_log import EventKind, EventLog, EventValue
from memshare.telemetry.explain import Cause, Explainer
from memshare.telemetry.stats import Counters, DropReason, Payload, PreemptionNote, RemapNote


class Recorder:
    """Counters, explanations and event log of one engine."""

    def __init__(self, config: MemShareConfig) -> None:
        event_log = config.event_log
        self.counters = Counters()
        self.explainer = Explainer(config.logs)
        self.step = 0
        self._events = EventLog(event_log) if event_log is not None else None

    def event(self, kind: EventKind, **fields: EventValue) -> None:
        """Log a transition with the engine step in which it happened."""
        if self._events is not None:
            self._events.record(kind, step=self.step, **fields)

    def pair(self, kind: EventKind, pair: Candidate, **fields: EventValue) -> None:
        """Log a transition of a pair."""
        if self._events is not None:
            target, donor = pair.target, pair.donor
            self._events.record(
                kind, step=self.step, request=target.state.request_id, target=target.index,
                target_block=target.block.block_id, donor_request=donor.state.request_id,
                donor=donor.index, donor_block=donor.block.block_id, **fields,
            )  # fmt: skip

    def drop(self, pair: Candidate, reason: DropReason) -> None:
        """A pair has come to nothing."""
        self.counters.add_labelled("dropped", reason)
        self.pair("dropped", pair, reason=reason)

    def remapped(self, pair: Candidate, freed: int, cause: Cause, moved: int) -> None:
        """A remap has been applied, has freed so many blocks and moved so many earlier sharers."""
        target, donor = pair.target, pair.donor
        request = target.state.request_id
        self.counters.add("applied")
        self.counters.add("blocks_reclaimed", freed)
        self.counters.note_remap(
            RemapNote(time.time(), request, target.index, donor.state.request_id, donor.index)
        )
        self.explainer.reclaimed(request, freed, cause)
        self.pair("applied", pair, damage=round(pair.damage, 4), freed=freed, moved=moved)

    def preempted(self, state: RequestState) -> None:
        """vLLM has taken the request's blocks."""
        request = state.request_id
        self.counters.add("preemptions")
        self.counters.note_preemption(PreemptionNote(time.time(), request, state.full))
        self.explainer.preempted(request, state.full)
        self.event("preempted", request=request, shared=len(state.repointed))

    def take_stats(self, gauges: dict[str, float]) -> Payload | None:
        """What has changed since the last call; None if nothing has."""
        if self._events is not None and (lost := self._events.take_dropped()):
            self.counters.add("events_dropped", lost)
        return self.counters.take(gauges)

    def close(self) -> None:
        """Write what is waiting. Idempotent."""
        if self._events is not None:
            self._events.close()
