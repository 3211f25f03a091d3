"""Counters in one place, in a form that crosses processes as plain numbers.

The scheduler side adds to a :class:`Counters`. Once per engine step it hands over the changes
(:meth:`Counters.take`), and the metrics front end merges the payloads.
:mod:`memshare.telemetry.metrics` lists what is counted.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypedDict

DropReason = Literal[
    "stage_two_full", "stale", "unknown_request", "unavailable", "protected",
    "no_gain", "replaced", "preempted", "finished",
]  # fmt: skip


class RemapNote(NamedTuple):
    """A remap that was applied; indexes into block tables, seconds since the epoch."""

    time: float
    request: str
    target: int
    donor_request: str
    donor: int


class CompactionNote(NamedTuple):
    """A round of compaction. Tokens under entries ``first`` to before ``end`` of the block table
    have been dropped: ``freed`` blocks in this round, ``holes`` since its last preemption."""

    time: float
    request: str
    first: int
    end: int
    freed: int
    holes: int


class PreemptionNote(NamedTuple):
    """A request that lost its blocks, and how many full ones."""

    time: float
    request: str
    blocks: int


class RequestRow(TypedDict):
    """One request as it was when last looked at.

    ``blocks`` are entries of its block table, of which ``prompt`` hold protected prompt, ``shared``
    are re-pointed and ``dropped`` are holes; ``tokens`` are those of prompt and output.
    """

    request: str
    tokens: int
    blocks: int
    prompt: int
    shared: int
    dropped: int
    preemptions: int


class Payload(TypedDict):
    """One interval's worth of numbers; survives msgpack and JSON (tuples come back as lists).

    ``blocks`` (all KV blocks by kind) and ``requests`` (those with most blocks) are empty unless
    they were looked at in the interval, and so is ``skews`` (of experts, by layer) unless they were
    counted.
    """

    counters: dict[str, int]
    labelled: dict[str, dict[str, int]]
    gauges: dict[str, float]
    distances: list[float]
    lags: list[float]
    packings: list[float]
    blocks: dict[str, int]
    requests: list[RequestRow]
    skews: dict[str, float]
    remaps: list[RemapNote]
    compactions: list[CompactionNote]
    preempted: list[PreemptionNote]


def empty_payload() -> Payload:
    """A payload that changes nothing."""
    return Payload(
        counters={}, labelled={}, gauges={}, distances=[], lags=[], packings=[], blocks={},
        requests=[], skews={}, remaps=[], compactions=[], preempted=[],
    )  # fmt: skip


def merge_payloads(into: Payload, other: Payload) -> None:
    """Fold a later payload into an earlier one; what is a state takes the later value."""
    for name, count in other["counters"].items():
        into["counters"][name] = into["counters"].get(name, 0) + count
    for name, by_label in other["labelled"].items():
        mine = into["labelled"].setdefault(name, {})
        for label, count in by_label.items():
            mine[label] = mine.get(label, 0) + count
    into["gauges"].update(other["gauges"])
    into["skews"].update(other["skews"])
    into["distances"].extend(other["distances"])
    into["lags"].extend(other["lags"])
    into["packings"].extend(other["packings"])
    into["remaps"].extend(other["remaps"])
    into["compactions"].extend(other["compactions"])
    into["preempted"].extend(other["preempted"])
    if other["blocks"]:
        into["blocks"] = other["blocks"]
        into["requests"] = other["requests"]


@dataclass
class Counters:
    """Counts since the last :meth:`take`, and totals since the start."""

    totals: Counter[str] = field(default_factory=Counter)
    packing_seconds: float = 0.0
    _counters: Counter[str] = field(default_factory=Counter)
    _labelled: dict[str, Counter[str]] = field(default_factory=dict)
    _gauges: dict[str, float] = field(default_factory=dict)
    _distances: list[float] = field(default_factory=list)
    _lags: list[float] = field(default_factory=list)
    _packings: list[float] = field(default_factory=list)
    _blocks: dict[str, int] = field(default_factory=dict)
    _requests: list[RequestRow] = field(default_factory=list)
    _skews: dict[str, float] = field(default_factory=dict)
    _remaps: list[RemapNote] = field(default_factory=list)
    _compactions: list[CompactionNote] = field(default_factory=list)
    _preempted: list[PreemptionNote] = field(default_factory=list)
    _changed: bool = False

    def add(self, name: str, count: int = 1) -> None:
        """Count one of ``memshare.telemetry.metrics.COUNTERS``."""
        self._counters[name] += count
        self.totals[name] += count
        self._changed = True

    def add_labelled(self, name: str, label: str, count: int = 1) -> None:
        """Count one of ``memshare.telemetry.metrics.LABELLED``."""
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

    def observe_packing(self, seconds: float) -> None:
        """Record how long choosing and moving tokens took in a step, in seconds."""
        self._packings.append(seconds)
        self.packing_seconds += seconds
        self._changed = True

    def note_remap(self, note: RemapNote) -> None:
        """Record a remap."""
        self._remaps.append(note)
        self._changed = True

    def note_compaction(self, note: CompactionNote) -> None:
        """Record a round of compaction."""
        self._compactions.append(note)
        self._changed = True

    def note_preemption(self, note: PreemptionNote) -> None:
        """Record a preemption."""
        self._preempted.append(note)
        self._changed = True

    def note_blocks(self, blocks: dict[str, int], requests: list[RequestRow]) -> None:
        """Record a look at all blocks and requests."""
        self._blocks, self._requests = blocks, requests
        self._changed = True

    def note_skews(self, skews: dict[str, float]) -> None:
        """Record how unevenly experts are used, by layer."""
        self._skews = skews
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
            packings=self._packings,
            blocks=self._blocks,
            requests=self._requests,
            skews=self._skews,
            remaps=self._remaps,
            compactions=self._compactions,
            preempted=self._preempted,
        )
        self._counters.clear()
        self._labelled.clear()
        self._distances, self._lags, self._packings = [], [], []
        self._blocks, self._requests, self._skews = {}, [], {}
        self._remaps, self._compactions, self._preempted = [], [], []
        self._changed = False
        return payload
