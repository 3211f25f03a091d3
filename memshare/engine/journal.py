"""Saying what happened: every transition is counted and, if asked, written to the event log."""

from __future__ import annotations

from pathlib import Path

from memshare.engine.requests import Candidate
from memshare.events import EventKind, EventLog, EventValue
from memshare.stats import DropReason, Payload, Tally


class Journal:
    """Counters and event log of one engine."""

    def __init__(self, event_log: Path | None) -> None:
        self.tally = Tally()
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
        self.tally.add_labelled("dropped", reason)
        self.pair("dropped", pair, reason=reason)

    def take_stats(self, gauges: dict[str, float]) -> Payload | None:
        """What has changed since the last call; None if nothing has."""
        if self._events is not None and (lost := self._events.take_dropped()):
            self.tally.add("events_dropped", lost)
        return self.tally.take(gauges)

    def close(self) -> None:
        """Write what is waiting. Idempotent."""
        if self._events is not None:
            self._events.close()
