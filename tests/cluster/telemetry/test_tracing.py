"""Spans around a request. Stand-ins: an exporter in memory, and outputs that no engine made."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from vllm.outputs import RequestOutput
from vllm.v1.metrics.stats import RequestStateStats

from cluster.telemetry.step_sample import StepSample
from cluster.telemetry.tracing import RequestSpans
from memshare.telemetry.stats import CompactionNote, PreemptionNote, RemapNote, empty_payload

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
FROM_CLIENT = {"traceparent": f"00-{TRACE}-{PARENT}-01"}


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr("cluster.telemetry.tracing.trace.get_tracer", provider.get_tracer)
    yield exporter
    provider.shutdown()


def output(times: RequestStateStats) -> RequestOutput:
    return RequestOutput("a", None, None, None, [], False, metrics=times)  # type: ignore[arg-type]


def step(
    remaps: list[RemapNote],
    preempted: list[PreemptionNote],
    compactions: list[CompactionNote] | None = None,
) -> StepSample:
    payload = {
        **empty_payload(), "remaps": remaps, "preempted": preempted,
        "compactions": compactions or [],
    }  # fmt: skip
    return StepSample(0.5, 1, 0, 1, 0, payload)  # type: ignore[arg-type]


async def drain(outputs: AsyncIterator[Any]) -> int:
    return len([one async for one in outputs])


async def test_spans_show_a_requests_way(exporter: InMemorySpanExporter) -> None:
    spans = RequestSpans({"a-1": "a"}.get)
    given: list[Mapping[str, str]] = []
    now = time.monotonic()
    times = RequestStateStats(
        queued_ts=now - 4, scheduled_ts=now - 3, first_token_ts=now - 2, last_token_ts=now - 0.5
    )

    async def start(context: Mapping[str, str]) -> AsyncIterator[RequestOutput]:
        given.append(context)
        yield output(times)
        spans.record(
            step(
                [RemapNote(50.0, "a-1", 2, "a-1", 7), RemapNote(50.0, "gone-1", 1, "gone-1", 2)],
                [PreemptionNote(60.0, "a-1", 9)],
            )
        )
        yield output(times)

    assert await drain(spans.follow("a", FROM_CLIENT, start)) == 2
    by_name = {span.name: span for span in exporter.get_finished_spans()}
    request = by_name["memshare.request"]
    assert request.parent is not None
    assert request.context is not None
    assert f"{request.context.trace_id:032x}" == TRACE
    assert f"{request.parent.span_id:016x}" == PARENT
    assert given[0]["traceparent"].split("-")[1:3] == [TRACE, f"{request.context.span_id:016x}"]
    assert request.attributes is not None
    assert request.attributes["memshare.blocks_reclaimed"] == 1
    reclaimed, preempted = request.events
    assert (reclaimed.name, reclaimed.timestamp) == ("memshare.reclaimed", 50_000_000_000)
    assert dict(reclaimed.attributes or {}) == {
        "memshare.targets": (2,),
        "memshare.donors": (7,),
    }
    assert dict(preempted.attributes or {}) == {"memshare.blocks": 9}
    for name, seconds in (("queue", 1.0), ("prefill", 1.0), ("decode", 1.5)):
        span = by_name[f"memshare.{name}"]
        assert duration(span) == pytest.approx(seconds, abs=1e-3)
        assert span.parent is not None
        assert span.parent.span_id == request.context.span_id
    assert spans._open == {}
    assert not spans._blocks


def duration(span: ReadableSpan) -> float:
    assert span.start_time is not None
    assert span.end_time is not None
    return (span.end_time - span.start_time) / 1e9


async def test_a_failed_request_is_an_error_and_only_what_happened_is_shown(
    exporter: InMemorySpanExporter,
) -> None:
    spans = RequestSpans(lambda _: None)

    async def start(context: Mapping[str, str]) -> AsyncIterator[RequestOutput]:
        yield output(RequestStateStats(queued_ts=time.monotonic()))
        raise RuntimeError("the engine has died")

    with pytest.raises(RuntimeError):
        await drain(spans.follow("a", None, start))
    (request,) = exporter.get_finished_spans()
    assert request.parent is None
    assert not request.status.is_ok
    assert [event.name for event in request.events] == ["exception"]


async def test_a_client_that_leaves_ends_the_span(exporter: InMemorySpanExporter) -> None:
    spans = RequestSpans(lambda _: None)

    async def start(context: Mapping[str, str]) -> AsyncIterator[RequestOutput]:
        while True:
            yield output(RequestStateStats())

    outputs = spans.follow("a", None, start)
    await anext(outputs)
    await outputs.aclose()
    assert [span.name for span in exporter.get_finished_spans()] == ["memshare.request"]
    assert spans._open == {}


async def test_requests_of_one_id_have_spans_of_their_own(exporter: InMemorySpanExporter) -> None:
    spans = RequestSpans({"a-1": "a", "a-2": "a"}.get)

    async def start(context: Mapping[str, str]) -> AsyncIterator[RequestOutput]:
        for _ in range(2):
            yield output(RequestStateStats())

    first, second = (spans.follow("a", None, start) for _ in range(2))
    await anext(first)
    await anext(second)
    spans.record(step([RemapNote(50.0, "a-1", 2, "a-1", 7)], []))
    assert await drain(first) == 1
    compaction = CompactionNote(55.0, "a-2", 3, 9, 4, 6)
    spans.record(step([], [PreemptionNote(60.0, "a-2", 9)], [compaction]))
    assert await drain(second) == 1
    events = [[event.name for event in span.events] for span in exporter.get_finished_spans()]
    assert events[0] == ["memshare.reclaimed"]
    assert events[1] == ["memshare.reclaimed", "memshare.compacted", "memshare.preempted"]
    assert not spans._open
    assert not spans._blocks
