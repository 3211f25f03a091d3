"""Tallies, and the payloads that carry them between processes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import get_args

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from memshare.telemetry.metrics import COUNTERS, GAUGES, LABELLED
from memshare.telemetry.stats import (
    CompactionNote,
    Counters,
    DropReason,
    Payload,
    PreemptionNote,
    RemapNote,
    RequestRow,
    empty_payload,
    merge_payloads,
)

NAMES = st.sampled_from(sorted(COUNTERS))
FAMILIES = st.sampled_from(sorted(LABELLED))
REASONS = st.sampled_from(get_args(DropReason))
NUMBERS = st.floats(0, 10)
Act = Callable[[Counters], object]

ACTS: st.SearchStrategy[Act] = st.one_of(
    st.builds(lambda n, c: lambda t: t.add(n, c), NAMES, st.integers(1, 5)),
    st.builds(
        lambda n, r, c: lambda t: t.add_labelled(n, r, c), FAMILIES, REASONS, st.integers(1, 5)
    ),
    st.builds(lambda d: lambda t: t.observe_distance(d), NUMBERS),
    st.builds(lambda s: lambda t: t.observe_lag(s), NUMBERS),
    st.builds(lambda s: lambda t: t.observe_packing(s), NUMBERS),
    st.builds(lambda n: lambda t: t.note_remap(RemapNote(n, "a", 1, "b", 2)), NUMBERS),
    st.builds(lambda n: lambda t: t.note_compaction(CompactionNote(n, "a", 1, 9, 2, 3)), NUMBERS),
    st.builds(lambda n: lambda t: t.note_preemption(PreemptionNote(n, "a", 3)), NUMBERS),
    st.builds(lambda n: lambda t: t.note_skews({"0": n}), NUMBERS),
    st.builds(
        lambda n: (
            lambda t: t.note_blocks(
                {"free": n},
                [
                    RequestRow(
                        request="a",
                        tokens=n,
                        blocks=n,
                        prompt=1,
                        shared=0,
                        dropped=0,
                        preemptions=0,
                    )
                ],
            )
        ),
        st.integers(1, 9),
    ),
)
INTERVALS = st.lists(
    st.tuples(
        st.lists(ACTS, max_size=6), st.dictionaries(st.sampled_from(sorted(GAUGES)), NUMBERS)
    ),
    max_size=6,
)


def plain(payload: Payload) -> Payload:
    """Make the order of a payload's keys not matter."""
    return json.loads(json.dumps(payload, sort_keys=True))


@given(INTERVALS)
def test_intervals_merge_into_the_whole(
    intervals: list[tuple[list[Act], dict[str, float]]],
) -> None:
    piecewise, whole = Counters(), Counters()
    merged, gauges = empty_payload(), {}
    for acts, now in intervals:
        for act in acts:
            act(piecewise)
            act(whole)
        gauges |= now
        payload = piecewise.take(now)
        if payload is not None:
            merge_payloads(merged, payload)
    assert plain(merged) == plain(whole.take(gauges) or empty_payload())
    assert piecewise.totals == whole.totals
    counted = Counter(merged["counters"])
    for family, by_label in merged["labelled"].items():
        counted.update({f"{family}:{label}": count for label, count in by_label.items()})
    assert counted == whole.totals


@given(INTERVALS)
def test_a_payload_crosses_processes_unchanged(
    intervals: list[tuple[list[Act], dict[str, float]]],
) -> None:
    counters = Counters()
    for acts, gauges in intervals:
        for act in acts:
            act(counters)
        payload = counters.take(gauges)
        if payload is not None:
            for crossed in (
                json.loads(json.dumps(payload)),
                msgspec.msgpack.decode(msgspec.msgpack.encode(payload)),
            ):
                crossed["remaps"] = [RemapNote(*row) for row in crossed["remaps"]]
                crossed["compactions"] = [CompactionNote(*row) for row in crossed["compactions"]]
                crossed["preempted"] = [PreemptionNote(*row) for row in crossed["preempted"]]
                assert crossed == payload


def test_a_quiet_interval_gives_nothing() -> None:
    counters = Counters()
    assert counters.take({}) is None
    assert counters.take({"free_blocks": 3.0}) is not None
    assert counters.take({"free_blocks": 3.0}) is None, "an unchanged gauge is no news"
    changed = counters.take({"free_blocks": 2.0})
    assert changed is not None
    assert changed["gauges"] == {"free_blocks": 2.0}
    counters.add("steps")
    assert counters.take({"free_blocks": 2.0}) == {**empty_payload(), "counters": {"steps": 1}}
    assert counters.take({"free_blocks": 2.0}) is None


def test_a_payload_taken_is_not_touched_again() -> None:
    counters = Counters()
    counters.observe_distance(0.5)
    counters.add_labelled("dropped", "stale")
    first = counters.take({})
    counters.observe_distance(0.25)
    counters.add_labelled("dropped", "stale")
    assert first is not None
    assert first["distances"] == [0.5]
    assert first["labelled"] == {"dropped": {"stale": 1}}
