"""What a replica makes of its engine's reports, and what the board makes of the replicas'."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import msgspec
import pytest

from cluster.config import PageConfig
from cluster.dashboard.engine_sampler import EngineSampler
from cluster.dashboard.hub import DashboardHub
from cluster.dashboard.records import (
    AdapterTokens,
    BlockTrace,
    ExpertUse,
    ReplicaReport,
    ReplicaSample,
    Reuse,
    Thinned,
)
from cluster.guard.guard import GuardState
from cluster.telemetry.step_sample import StepSample
from memshare.telemetry.stats import (
    CompactionNote,
    Payload,
    PreemptionNote,
    RemapNote,
    RequestRow,
    empty_payload,
    merge_payloads,
)


@dataclass
class Request:
    prompt: Sequence[int]
    output: list[int] = field(default_factory=list)


@dataclass
class Rig:
    """A watch over a front end of which only the live requests are real."""

    show_text: bool = False
    requests: dict[str, Request] = field(default_factory=dict)
    now: float = 1000.0

    def __post_init__(self) -> None:
        self.watch = EngineSampler(
            "replica-1",
            "node",
            blocks=50,
            block_size=4,
            find=self.requests.get,
            unfinished=lambda: len(self.requests),
            decode=(lambda tokens: "".join(chr(t) for t in tokens)) if self.show_text else None,
            clock=lambda: self.now,
        )

    def step(self, payload: Payload | None = None, **changes: float) -> None:
        step = StepSample(usage=0.5, running=2, waiting=1, tokens=2, preempted=0, payload=payload)
        self.watch.record(step if not changes else StepSample(**{**vars(step), **changes}))

    def trace(self, request: str) -> BlockTrace | None:
        return asyncio.run(self.watch.trace(request))

    def next_sample(self) -> ReplicaSample:
        self.now += 1
        self.watch.sample()
        return self.watch.report().samples[-1]


@pytest.fixture
def rig() -> Rig:
    rig = Rig()
    rig.requests["a"] = Request(range(6), list(range(100, 110)))
    return rig


def payload(**parts: object) -> Payload:
    made = empty_payload()
    made.update(parts)  # type: ignore[typeddict-item]
    crossed: Payload = msgspec.msgpack.decode(msgspec.msgpack.encode(made))
    return crossed  # as the front end gets it


def remap(target: int, donor: int, request: str = "a", other: str | None = None) -> RemapNote:
    return RemapNote(5.0, request, target, other or request, donor)


def test_a_sample_adds_up_an_interval_and_keeps_the_last_state(rig: Rig) -> None:
    rig.step(payload(counters={"blocks_reclaimed": 2}, lags=[0.5, 0.1], gauges={"queue_length": 9}))
    rig.step(payload(counters={"blocks_reclaimed": 1, "preemptions_avoided": 1}))
    rig.step(usage=0.75, running=3, preempted=1)
    assert rig.next_sample() == ReplicaSample(
        time=1001.0, usage=0.75, running=3, waiting=1, tokens=6, preempted=1, reclaimed=3,
        avoided=1, shared=0, queued=9, lag=0.5,
    )  # fmt: skip
    quiet = rig.next_sample()
    assert (quiet.tokens, quiet.preempted, quiet.reclaimed, quiet.lag) == (0, 0, 0, None)
    assert (quiet.usage, quiet.running) == (0.75, 3), "the state stays"


def test_a_preemption_counts_at_once_and_once(rig: Rig) -> None:
    """vLLM tells of it when the request runs again."""
    rig.step(payload(counters={"preemptions": 2}))
    assert rig.next_sample().preempted == 2
    rig.step(preempted=1)
    assert rig.next_sample().preempted == 0, "one of the two"
    rig.step(preempted=3)  # the other one, and two of requests that MemShare does not follow
    assert rig.next_sample().preempted == 2


def test_an_engine_that_has_nothing_to_do_is_idle_though_it_reports_nothing(
    rig: Rig,
) -> None:
    rows = [RequestRow(request="a", tokens=16, blocks=4, prompt=2, shared=0, preemptions=0)]
    rig.step(payload(blocks={"prompt": 2, "free": 46, "other": 2}, requests=rows))
    assert rig.next_sample().usage == 0.5
    assert rig.watch.report().requests == rows
    rig.requests.clear()
    sample = rig.next_sample()
    assert (sample.usage, sample.running, sample.waiting) == (0.0, 0, 0)
    report = rig.watch.report()
    assert report.requests == []
    assert report.kinds == {"prompt": 0, "free": 50, "other": 0}


def test_nothing_is_kept_of_a_payload_that_changes_later(rig: Rig) -> None:
    mine = payload(blocks={"free": 50}, remaps=[remap(1, 3)], counters={"blocks_reclaimed": 1})
    rig.step(mine)
    merge_payloads(mine, payload(blocks={"free": 1}, remaps=[remap(2, 3)], lags=[9.0]))
    mine["counters"]["blocks_reclaimed"] = 100
    assert rig.next_sample().reclaimed == 1
    trace = rig.trace("a")
    assert trace is not None
    assert [reuse.target for reuse in trace.reused] == [1]
    assert rig.watch.report().kinds == {"free": 50}


def test_a_trace_says_which_blocks_were_given_up_and_where_they_point(
    rig: Rig,
) -> None:
    rig.requests["b"] = Request([1])
    rig.step(payload(remaps=[remap(2, 3), remap(1, 0, other="b")]))
    assert rig.trace("a") == BlockTrace(
        request="a", live=True, block_size=4, prompt_tokens=6, tokens=16,
        reused=[Reuse(1, 0, "b", 5.0), Reuse(2, 3, None, 5.0)], preempted=[], texts=None,
    )  # fmt: skip
    assert rig.trace("nobody") is None


def test_a_preemption_clears_the_trace_and_a_later_remap_begins_anew(rig: Rig) -> None:
    rig.step(payload(remaps=[remap(2, 3)]))
    rig.step(payload(preempted=[PreemptionNote(7.0, "a", 4)]))
    rig.step(payload(remaps=[remap(1, 3)]))
    trace = rig.trace("a")
    assert trace is not None
    assert [reuse.target for reuse in trace.reused] == [1]
    assert trace.preempted == [7.0]


def test_a_trace_says_what_compaction_has_left(rig: Rig) -> None:
    rig.step(payload(compactions=[CompactionNote(5.0, "a", 1, 3, 1, 1)]))
    rig.step(payload(compactions=[CompactionNote(6.0, "a", 1, 4, 1, 2)], gauges={"holes": 2.0}))
    trace = rig.trace("a")
    assert trace is not None
    assert trace.thinned == Thinned(1, 4, 2, 6.0)
    assert rig.next_sample().shared == 2
    rig.step(payload(preempted=[PreemptionNote(7.0, "a", 4)]))
    trace = rig.trace("a")
    assert trace is not None
    assert trace.thinned is None


def test_text_is_shown_by_block_and_only_if_allowed() -> None:
    request = Request([ord(c) for c in "prompt"], [ord(c) for c in "output!"])
    texts = []
    for show_text in (True, False):
        rig = Rig(show_text)
        rig.requests["a"] = request
        trace = rig.trace("a")
        assert trace is not None
        texts.append(trace.texts)
    assert texts == [["prom", "ptou", "tput", "!"], None]


def test_traces_of_requests_that_have_ended_are_kept_but_not_for_ever(
    rig: Rig,
) -> None:
    for i in range(60):
        rig.requests[f"r{i}"] = Request(range(4))
        rig.step(payload(remaps=[remap(1, 0, request=f"r{i}")]))
        del rig.requests[f"r{i}"]
        rig.watch.sample()
    ended = rig.watch.report().ended
    assert ended == [f"r{i}" for i in range(28, 60)]
    assert rig.trace("r0") is None
    trace = rig.trace("r59")
    assert trace is not None
    assert not trace.live
    assert len(trace.reused) == 1


def test_samples_wait_for_a_board_that_is_away_but_not_without_bound(rig: Rig) -> None:
    for _ in range(500):
        rig.next_sample()
    report = rig.watch.report()
    assert len(report.samples) == 120
    rig.next_sample()
    rig.watch.sent(report)
    assert [s.time for s in rig.watch.report().samples] == [1501.0]


def test_what_adapters_have_found_adds_up(rig: Rig) -> None:
    rig.step()
    assert rig.watch.report().adapters == {}
    for _ in range(2):
        found = {"plan": 32, "act": 64}
        rig.step(
            payload(labelled={"agent_tokens_found": found, "agent_tokens_shared": {"act": 32}})
        )
    rig.next_sample()
    adapters = {"plan": AdapterTokens(64, 0), "act": AdapterTokens(128, 64)}
    assert rig.watch.report().adapters == adapters


def test_what_layers_choose_adds_up(rig: Rig) -> None:
    for skew in (2.5, 1.5):
        counts = {"experts_touched": {"0": 5, "3": 4}, "expert_tokens": {"0": 8, "3": 8}}
        rig.step(payload(counters={"expert_steps": 1}, labelled=counts, skews={"0": skew, "3": 1}))
    rig.step(payload(skews={"0": 1.25, "3": 1}))  # with a prompt in it
    rig.next_sample()
    expected = {"0": ExpertUse(2, 10, 16, 1.25), "3": ExpertUse(2, 8, 16, 1)}
    assert rig.watch.report().experts == expected


# ---- the board ----


def report(name: str = "r", times: Sequence[float] = (1.0,), started: float = 0.0) -> ReplicaReport:
    samples = [ReplicaSample(t, 0.5, 1, 0, 3, 0, 0, 0, 0, 0, None) for t in times]
    return ReplicaReport(name, "node", started, 50, samples, {}, [])


def times(state: dict[str, object]) -> dict[str, list[float]]:
    plain = json.loads(json.dumps(state))
    return {r["id"]: [sample[0] for sample in r["samples"]] for r in plain["replicas"]}


async def test_a_browser_gets_everything_once() -> None:
    board = DashboardHub(PageConfig())
    await board.report(report("x", (1, 2)))
    await board.report(report("y", (1,), started=5))
    first = await board.state("", 0)
    assert times(first) == {"x": [1, 2], "y": [1]}
    await board.report(report("x", (3,)))
    name, number = str(first["board"]), int(str(first["number"]))
    assert times(await board.state(name, number)) == {"x": [3], "y": []}
    assert times(await board.state("another board", number)) == {"x": [1, 2, 3], "y": [1]}


async def test_a_browser_is_told_what_adapters_have_found() -> None:
    board = DashboardHub(PageConfig())
    await board.report(replace(report("x"), adapters={"plan": AdapterTokens(64, 32)}))
    (replica,) = json.loads(json.dumps(await board.state("", 0)))["replicas"]
    assert replica["adapters"] == {"plan": {"found": 64, "shared": 32}}


async def test_a_browser_is_told_of_experts() -> None:
    board = DashboardHub(PageConfig())
    await board.report(replace(report("x"), experts={"0": ExpertUse(2, 10, 16, 1.25)}))
    (replica,) = json.loads(json.dumps(await board.state("", 0)))["replicas"]
    assert replica["experts"] == {"0": {"steps": 2, "touched": 10, "tokens": 16, "skew": 1.25}}


async def test_a_replica_that_its_guard_has_stopped_hears_of_an_operator_once() -> None:
    board = DashboardHub(PageConfig())
    stopped = GuardState(0.3, 0.2, 0.4, 9, 1, True)
    assert not await board.let_go_on("x"), "there is no such replica"
    await board.report(replace(report("y"), guard=stopped._replace(stopped=False)))
    assert not await board.let_go_on("y"), "it has not been stopped"
    assert not (await board.report(replace(report("x"), guard=stopped))).go_on
    (shown, _) = json.loads(json.dumps(await board.state("", 0)))["replicas"]
    assert shown["guard"] == stopped._asdict()
    assert await board.let_go_on("x")
    assert not (await board.report(report("y"))).go_on
    assert (await board.report(replace(report("x"), guard=stopped))).go_on
    assert not (await board.report(replace(report("x"), guard=stopped))).go_on


async def test_memory_is_bounded_and_replicas_that_are_gone_go() -> None:
    now = [0.0]
    board = DashboardHub(PageConfig(minutes=1, interval_s=1), clock=lambda: now[0])
    for second in range(300):
        now[0] = second
        await board.report(report("x", (second,)))
        if second < 100:
            await board.report(report("gone", (second,)))
        if second == 110:
            replicas = json.loads(json.dumps(await board.state("", 0)))["replicas"]
            assert {r["id"]: r["silent_s"] for r in replicas} == {"x": 0, "gone": 11}
    assert times(await board.state("", 0)) == {"x": list(range(239, 300))}


async def test_a_trace_is_asked_for_with_the_next_report() -> None:
    board = DashboardHub(PageConfig())
    assert (await board.report(report("x"))).traces == []
    trace = BlockTrace("a", True, 4, 6, 16, [Reuse(1, 2, None, 5.0)], [], None)
    browsers = [asyncio.create_task(board.trace("x", "a")) for _ in range(2)]
    await asyncio.sleep(0)
    assert (await board.report(report("y"))).traces == []
    assert (await board.report(report("x"))).traces == ["a"]
    await board.deliver("x", "a", trace)
    assert await asyncio.gather(*browsers) == [trace, trace]
    assert (await board.report(report("x"))).traces == [], "asked once"
    assert await board.trace("no such replica", "a") is None


async def test_a_replica_that_does_not_answer_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cluster.dashboard.hub._TRACE_WAIT_S", 0.05)
    board = DashboardHub(PageConfig())
    await board.report(report("x"))
    assert await board.trace("x", "a") is None
    assert (await board.report(report("x"))).traces == []
