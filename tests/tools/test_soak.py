"""Streams for servers under test, and what soak runs make of them (tools/)."""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tools.bench import load
from tools.bench.load import StreamLoad, StreamOutcome, http_streams, summarize
from tools.bench.local_cluster import Killed, Server
from tools.bench.soak import __main__ as soak
from tools.bench.soak.report import (
    COUNTED,
    ClusterSample,
    Fault,
    SoakRecord,
    excused,
    growth,
    judge,
    render,
    write,
)

WORDS = ("one ", "two ", "three")
Answer = Callable[[web.Request, web.StreamResponse], Awaitable[None]]


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that tries again does so at once."""
    monkeypatch.setattr(load, "_WAIT_S", 0.01)


def event(text: str, finish: str | None = None) -> bytes:
    choice = {"text": text, "finish_reason": finish}
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


async def whole(request: web.Request, answer: web.StreamResponse) -> None:
    for word in WORDS:
        await answer.write(event(word))
        await asyncio.sleep(0.01)
    await answer.write(event("", "length") + b"data: [DONE]\n\n")


async def broken_off(request: web.Request, answer: web.StreamResponse) -> None:
    await answer.write(event("one "))
    assert request.transport is not None
    request.transport.abort()


async def silent_end(request: web.Request, answer: web.StreamResponse) -> None:
    await answer.write(event("one "))


async def error(request: web.Request, answer: web.StreamResponse) -> None:
    await answer.write(b'data: {"error": {"message": "EngineCore encountered an issue"}}\n\n')


async def ask(
    status: int, say: Answer | None, at_once: int = 2, requests: int = 4
) -> list[StreamOutcome]:
    """Run a load against a server that answers like this."""

    async def handle(request: web.Request) -> web.StreamResponse:
        assert (await request.json())["stream"] is True
        if say is None:
            return web.Response(status=status, text="no", headers={"Retry-After": "0"})
        answer = web.StreamResponse(status=status)
        await answer.prepare(request)
        await say(request, answer)
        return answer

    app = web.Application()
    app.router.add_post("/", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    url = f"http://127.0.0.1:{port}/"
    load = StreamLoad(lambda: http_streams(url, lambda index: {"n": index}), at_once)
    try:
        await load.run(requests)
    finally:
        await runner.cleanup()
    return load.outcomes


async def test_whole_answers_are_timed() -> None:
    outcomes = await ask(200, whole)
    assert sorted(outcome.index for outcome in outcomes) == [0, 1, 2, 3]
    assert {o.ending for o in outcomes} == {"whole"}
    assert {o.text for o in outcomes} == {"one two three"}
    found = summarize(outcomes)
    assert found.endings == {"whole": 4}
    assert 0 < found.first_token_p50 < found.first_token_p99 + 1e-9
    assert found.between_tokens_p50 > 0.005
    assert found.requests_per_s > 0


@pytest.mark.usefixtures("no_pause")
@pytest.mark.parametrize(
    ("status", "say", "ending", "detail"),
    [
        (429, None, "refused", "HTTP 429"),
        (503, None, "refused", "HTTP 503"),
        (500, None, "failed", "HTTP 500: no"),
        (200, broken_off, "failed", "Client"),
        (200, silent_end, "failed", "ended without a reason"),
        (200, error, "failed", "EngineCore encountered an issue"),
    ],
)
async def test_what_is_not_whole_is_told(
    status: int, say: Answer | None, ending: str, detail: str
) -> None:
    (outcome,) = await ask(status, say, at_once=1, requests=1)
    assert outcome.ending == ending
    assert detail in outcome.detail
    assert summarize([outcome]).requests_per_s == 0


class StandIn:
    """A server that answers at once, in place of tools/bench/local_cluster.py's."""

    def __init__(self) -> None:
        self.questions = 0
        self.tokens = 0

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if body.get("stream"):
            self.tokens += len(WORDS)
            answer = web.StreamResponse()
            await answer.prepare(request)
            await whole(request, answer)
            return answer
        self.questions += 1
        choice = {"text": body["prompt"], "index": 0, "finish_reason": "length"}
        return web.json_response(
            {
                "id": "1",
                "object": "text_completion",
                "created": 1,
                "model": "m",
                "choices": [choice],
            }
        )

    async def metrics(self, request: web.Request) -> web.StreamResponse:
        lines = [
            'vllm:kv_cache_usage_perc{engine="0"} 0.0',
            'vllm:num_preemptions_total{engine="0"} 7.0',
            'vllm:memshare_integrity_checks_total{engine="0",result="passed"} 5.0',
        ]
        return web.Response(text="\n".join(lines))


async def test_a_soak_run_breaks_rests_and_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run itself; server, faults and their end are stand-ins."""
    stand_in = StandIn()
    app = web.Application()
    app.router.add_post("/v1/chat/completions", stand_in.answer)
    app.router.add_post("/v1/completions", stand_in.answer)
    app.router.add_get("/metrics", stand_in.metrics)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    killed: list[str] = []
    loop, written = asyncio.get_running_loop(), len(WORDS)

    def kill(role: str) -> Killed:
        killed.append(role)
        return Killed(role, 1, 0.0, {})

    def wait_until_whole(server: Server, fault: Killed) -> float:
        """The run ends by what it has seen and not by the clock: both roles, a sample, a stream."""
        record = running.record
        while len(record.samples) == len(record.probes) or stand_in.tokens < written:
            time.sleep(0.01)
        if set(killed) == {"engine", "proxy"}:
            loop.call_soon_threadsafe(running._over.set)
        return 0.5

    monkeypatch.setattr(soak, "kill", kill)
    monkeypatch.setattr(soak, "victims", lambda role: [role] * (role != "worker"))
    monkeypatch.setattr(soak, "wait_until_whole", wait_until_whole)
    monkeypatch.setattr(soak, "processes", lambda title: [])  # nothing here is the server's
    monkeypatch.setattr(soak, "SAMPLE_S", 0.05)
    monkeypatch.setattr(soak, "SETTLE_S", 0.0)
    args = argparse.Namespace(
        load=False, streams=3, hours=1.0, every=0.01, faults=["engine", "proxy", "worker"],
        seed=1, replicas=1,
    )  # fmt: skip
    server: Any = Server(subprocess.Popen(["true"]), url, "", Path())
    running = soak.Soak(server, args)
    try:
        run = await running.run()
    finally:
        await runner.cleanup()
    assert [fault.role for fault in run.faults] == killed
    assert set(killed) == {"engine", "proxy"}
    assert len(run.probes) == len(killed) + 2, "before, after each, and at the end"
    assert stand_in.questions == len(run.probes) * len(soak.PROBES)
    assert len(run.outcomes) * len(WORDS) == stand_in.tokens > 0
    assert len(run.samples) > len(run.probes), "also while it runs"
    assert run.counters["vllm:num_preemptions_total"] == 7
    assert run.counters["vllm:memshare_integrity_checks_total"] == 0, "only failures count"
    checks = list(judge(run, graded=True))
    assert [check.name for check in checks if not check.passed] == []
    assert "| engine |" in render(run, checks)


def outcome(sent: float, ended: float, ending: Any = "failed") -> StreamOutcome:
    return StreamOutcome(1, sent, ended, ending, first_token=sent + 0.1, chunks=2)


def test_only_what_a_fault_touched_is_excused() -> None:
    fault = Fault("engine", at=100.0, whole_at=140.0)
    assert excused(outcome(90, 101), [fault]), "was in flight"
    assert excused(outcome(120, 121), [fault])
    assert excused(outcome(139, 160), [fault])
    assert not excused(outcome(90, 99), [fault])
    assert not excused(outcome(150, 151), [fault])


def test_growth_leaves_out_the_warm_up() -> None:
    assert growth([1.0, 1.0, 10.0, 10.0, 10.0, 10.0, 11.0, 11.0]) == pytest.approx(0.1)
    assert growth([1.0, 2.0, 3.0]) == 0.0


def record(**changes: Any) -> SoakRecord:
    sample = ClusterSample(
        0.0, True, {"engine 7": 1 << 30, "raylet 8": 1 << 20}, 1 << 30, 9, 1, 5, 0.0
    )
    samples = [replace(sample, at=float(i)) for i in range(12)]
    fields: dict[str, Any] = {
        "seconds": 600.0, "faults": [Fault("engine", 100.0, 140.0)], "samples": samples,
        "outcomes": [outcome(90, 101), outcome(200, 201, "whole")],
        "probes": [(0.0, ["a"]), (1.0, ["a"])],
    }  # fmt: skip
    return SoakRecord("--hours 1", "a machine", **fields | changes)


def failed(run: SoakRecord) -> set[str]:
    return {check.name for check in judge(run, graded=False) if not check.passed}


def test_a_sound_run_passes_and_is_reported(tmp_path: Path) -> None:
    run = record()
    write(tmp_path, run, list(judge(run, graded=False)))
    kept = json.loads((tmp_path / "report.json").read_text())
    assert kept["counters"] == dict.fromkeys(COUNTED, 0)
    assert [check["passed"] for check in kept["checks"]] == [True] * len(kept["checks"])
    assert failed(run) == set()
    report = render(run, list(judge(run, graded=False)))
    assert "| engine | 1 | 40.0 (40.0) | 1 | 0 |" in report
    assert "| engine 7 | 1024 | 1024 | +0.0% | +0.00 |" in report
    assert "raylet" not in report, "too small to matter"
    assert "**no**" not in report


def test_each_check_can_fail() -> None:
    base = record()
    last = base.samples[-1]

    def ends_with(**changes: Any) -> SoakRecord:
        return record(samples=[*base.samples[:-1], replace(last, **changes)])

    bad = {
        "the run went to its end": record(cut_short="interrupted"),
        "no request fails outside a fault": record(outcomes=[outcome(200, 201)]),
        "service is whole within 60 s": record(faults=[Fault("engine", 60.0, 121.0)]),
        "fixed questions are answered as at the start": record(probes=[(0.0, ["a"]), (1.0, ["b"])]),
        "every KV block is free when nothing runs": ends_with(kv_usage=0.01),
        "no processes are left over": ends_with(processes=10),
        "no segments are left over": ends_with(segments=2),
        "no ports are left over": ends_with(ports=6),
        "memory is flat after warm-up": record(
            samples=[replace(s, total=s.total + i * (40 << 20)) for i, s in enumerate(base.samples)]
        ),
    }
    for name, run in bad.items():
        assert failed(run) == {name}
    assert failed(record(cut_short="interrupted", probes=[], samples=[])) == {
        "the run went to its end"
    }
    unsound = record()
    unsound.counters[COUNTED[2]] = 1
    assert failed(unsound) == {"bookkeeping is sound"}


def test_memory_is_told_of_each_process_that_stayed() -> None:
    leak = [
        replace(
            record().samples[0],
            at=60.0 * minute,
            memory={
                "engine 7": (100 + 2 * minute) << 20,
                **({"proxy 9": 99 << 20} if minute < 9 else {}),
            },
            total=(100 + 2 * minute) << 20,
        )
        for minute in range(12)
    ]
    report = render(record(samples=leak), [])
    assert "| engine 7 | 108 | 120 | +11.1% | +2.00 |" in report
    assert "proxy 9" not in report
