"""OpenTelemetry spans of a request's way, around the one that vLLM makes.

vLLM, told by ``otlp_traces_endpoint`` where to, exports one span for each request, ``llm_request``,
with its times in queue, prefill and decode as attributes, under the trace context that came with
the request. Ours stands around it and shows the same times as spans, and what MemShare did as
events::

    memshare.request            remaps, compactions, preemptions as events
      memshare.queue            waiting to be scheduled
      memshare.prefill          up to the first token
      memshare.decode           up to the last one
      llm_request               vLLM's own

They go through vLLM's exporter. Without that option none of this is in a request's way.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing

from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from vllm.outputs import RequestOutput
from vllm.v1.metrics.stats import RequestStateStats

from cluster.telemetry.step_sample import StepSample
from memshare.telemetry.stats import CompactionNote, PreemptionNote, RemapNote

_CONTEXT = TraceContextTextMapPropagator()

Start = Callable[[Mapping[str, str]], AsyncGenerator[RequestOutput, None]]


class RequestSpans:
    """Makes the spans of all requests of one engine."""

    def __init__(self, client_id: Callable[[str], str | None]) -> None:
        """Use the exporter that vLLM has set up.

        Args:
            client_id: the engine's id of a live request to the front end's; None if it has gone.
        """
        self._client_id = client_id
        self._tracer: Tracer = trace.get_tracer("memshare")
        # Clients may send several requests under one id at the same time.
        self._open: defaultdict[str, list[Span]] = defaultdict(list)
        self._blocks: Counter[Span] = Counter()  # given up

    async def follow(
        self, request_id: str, headers: Mapping[str, str] | None, start: Start
    ) -> AsyncGenerator[RequestOutput, None]:
        """Pass a request's outputs on, inside a span.

        Args:
            request_id: the front end's id.
            headers: trace context of the client (W3C ``traceparent``), if it sent one.
            start: begins the request, given the trace context of our span.
        """
        span = self._tracer.start_span(
            "memshare.request",
            _CONTEXT.extract(headers or {}),
            SpanKind.SERVER,
            {"gen_ai.request.id": request_id},
        )
        context: dict[str, str] = {}
        _CONTEXT.inject(context, trace.set_span_in_context(span))
        self._open[request_id].append(span)
        times: RequestStateStats | None = None
        try:
            async with aclosing(start(context)) as outputs:
                async for output in outputs:
                    if isinstance(output.metrics, RequestStateStats):
                        times = output.metrics
                    yield output
        except Exception as error:
            span.record_exception(error)
            span.set_status(Status(StatusCode.ERROR, str(error)))
            raise
        finally:
            if times is not None:
                self._add_phases(span, times)
            span.set_attribute("memshare.blocks_reclaimed", self._blocks.pop(span, 0))
            span.end()
            self._open[request_id].remove(span)
            if not self._open[request_id]:
                del self._open[request_id]

    def record(self, step: StepSample) -> None:
        """Note on the spans what MemShare and vLLM did to their requests in an engine step.

        Requests that run under one id have spans of their own, each with what was done to any.
        """
        if step.payload is None or not self._open:
            return
        remaps: defaultdict[str, list[RemapNote]] = defaultdict(list)
        for remap in map(RemapNote._make, step.payload["remaps"]):
            remaps[self._client_id(remap.request) or ""].append(remap)
        for name, notes in remaps.items():
            for span in self._open.get(name, ()):
                self._blocks[span] += len(notes)
            self._add_event(
                name,
                "memshare.reclaimed",
                {
                    "memshare.targets": [note.target for note in notes],
                    "memshare.donors": [note.donor for note in notes],
                },
                notes[-1].time,
            )
        for note in map(CompactionNote._make, step.payload["compactions"]):
            name = self._client_id(note.request) or ""
            for span in self._open.get(name, ()):
                self._blocks[span] += note.freed
            self._add_event(name, "memshare.compacted", {"memshare.blocks": note.freed}, note.time)
        for preempted in map(PreemptionNote._make, step.payload["preempted"]):
            self._add_event(
                self._client_id(preempted.request) or "",
                "memshare.preempted",
                {"memshare.blocks": preempted.blocks},
                preempted.time,
            )

    def _add_event(
        self, request_id: str, name: str, attributes: Mapping[str, int | list[int]], at: float
    ) -> None:
        for span in self._open.get(request_id, ()):
            span.add_event(name, attributes, _nanoseconds(at))

    def _add_phases(self, parent: Span, times: RequestStateStats) -> None:
        # The engine's clock is monotonic, and the same for all processes of a machine.
        offset = time.time() - time.monotonic()
        context = trace.set_span_in_context(parent)
        for name, begin, end in (
            ("memshare.queue", times.queued_ts, times.scheduled_ts),
            ("memshare.prefill", times.scheduled_ts, times.first_token_ts),
            ("memshare.decode", times.first_token_ts, times.last_token_ts),
        ):
            if begin and end:  # 0: it did not come so far
                span = self._tracer.start_span(
                    name, context, start_time=_nanoseconds(begin + offset)
                )
                span.end(_nanoseconds(end + offset))


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
