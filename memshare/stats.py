"""Counting what happens, in one place, in a form that crosses processes as plain numbers.

The scheduler side adds to a :class:`Tally`; once an engine step it hands over what has changed
(:meth:`Tally.take`), and the metrics front end folds the payloads together.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal, TypedDict

DropReason = Literal[
    "stage_two_full", "stale", "unknown_request", "unavailable", "protected",
    "no_gain", "replaced", "preempted", "finished",
]  # fmt: skip

COUNTERS = {
    "steps": "Reasoning steps finished.",
    "candidates": "Candidate pairs proposed by stage one.",
    "compared": "Pairs compared by stage two.",
    "verified": "Pairs whose similarity reached the threshold.",
    "rejected": "Pairs whose similarity did not reach the threshold.",
    "applied": "Remaps applied.",
    "blocks_reclaimed": "KV blocks returned to the free pool by remaps.",
    "preemptions": "Preemptions that happened all the same.",
    "preemptions_avoided": "Times an allocation found no free block and a remap gave it one, "
    "or the next step's demand exceeded the free blocks and remaps covered it.",
    "remap_misses": "Remaps for a request that a worker did not know.",
    "events_dropped": "Lines missing from the event log because the disk lagged behind.",
}
LABELLED = {
    "dropped": ("reason", "Candidate or verified pairs that came to nothing."),
    "steps_dropped": ("reason", "Steps that stage one never saw."),
    "evaluator_faults": ("reason", "Faults of evaluators."),
    "opted_out": ("reason", "Requests that MemShare leaves exact."),
    "integrity_checks": ("result", "Integrity checks."),
}
GAUGES = {
    "queue_length": "Verified pairs in the reclaim queue.",
    "pairs_waiting": "Candidate pairs waiting for stage two.",
    "shared_entries": "Block-table entries of live requests that are re-pointed now.",
    "free_blocks": "Free KV blocks.",
    "admission_reserve": "Blocks that the admission of a waiting request must leave free.",
    "sharing_stopped": "1 after a failed integrity check stopped further remaps.",
}
DISTANCE_BUCKETS = (0.001, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.5)
LAG_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


class Payload(TypedDict):
    """One interval's worth of numbers; survives msgpack and JSON."""

    counters: dict[str, int]
    labelled: dict[str, dict[str, int]]
    gauges: dict[str, float]
    distances: list[float]
    lags: list[float]


def empty_payload() -> Payload:
    """A payload that changes nothing."""
    return Payload(counters={}, labelled={}, gauges={}, distances=[], lags=[])


def merge_payloads(into: Payload, other: Payload) -> None:
    """Fold a later payload into an earlier one; gauges take the later value."""
    for name, count in other["counters"].items():
        into["counters"][name] = into["counters"].get(name, 0) + count
    for name, by_label in other["labelled"].items():
        mine = into["labelled"].setdefault(name, {})
        for label, count in by_label.items():
            mine[label] = mine.get(label, 0) + count
    into["gauges"].update(other["gauges"])
    into["distances"].extend(other["distances"])
    into["lags"].extend(other["lags"])


@dataclass
class Tally:
    """Counts since the last :meth:`take`, and totals since the start."""

    totals: Counter[str] = field(default_factory=Counter)
    _counters: Counter[str] = field(default_factory=Counter)
    _labelled: dict[str, Counter[str]] = field(default_factory=dict)
    _gauges: dict[str, float] = field(default_factory=dict)
    _distances: list[float] = field(default_factory=list)
    _lags: list[float] = field(default_factory=list)
    _changed: bool = False

    def add(self, name: str, count: int = 1) -> None:
        """Count one of ``COUNTERS``."""
        self._counters[name] += count
        self.totals[name] += count
        self._changed = True

    def add_labelled(self, name: str, label: str, count: int = 1) -> None:
        """Count one of ``LABELLED``."""
        self._labelled.setdefault(name, Counter())[label] += count
        self.totals[f"{name}:{label}"] += count
        self._changed = True

    def observe_distance(self, distance: float) -> None:
        """Record 1 - similarity of one compared pair."""
        self._distances.append(distance)
        self._changed = True

    def observe_lag(self, seconds: float) -> None:
        """Record how long an evaluator took to answer, in seconds."""
        self._lags.append(seconds)
        self._changed = True

    def take(self, gauges: dict[str, float]) -> Payload | None:
        """What has changed since the last call; None if nothing has."""
        changed = {n: v for n, v in gauges.items() if self._gauges.get(n) != v}
        if not self._changed and not changed:
            return None
        self._gauges.update(changed)
        payload = Payload(
            counters=dict(self._counters),
            labelled={name: dict(counts) for name, counts in self._labelled.items()},
            gauges=changed,
            distances=self._distances,
            lags=self._lags,
        )
        self._counters.clear()
        self._labelled.clear()
        self._distances, self._lags = [], []
        self._changed = False
        return payload
