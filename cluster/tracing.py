"""OpenTelemetry spans of a request's way, around the one that vLLM makes.

vLLM, told by ``otlp_traces_endpoint`` where to, exports one span for each request, ``llm_request``,
with its times in queue, prefill and decode as attributes, under the trace context that came with
the request. Ours stands around it and shows the same times as spans, and what MemShare did as
events::

    memshare.request            remaps and preemptions as events
      memshare.queue            waiting to be scheduled
      memshare.prefill          up to the first token
      memshare.decode           up to the last one
      llm_request               vLLM's own

They go through vLLM's exporter. Without that option none of this is in a request's way.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping

from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from vllm.outputs import RequestOutput
from vllm.v1.metrics.stats import RequestStateStats

from cluster.dashboard.watch import Step
from memshare.stats import PreemptionNote, RemapNote

_CONTEXT = TraceContextTextMapPropagator()

Start = Callable[[Mapping[str, str]], AsyncIterator[RequestOutput]]


class RequestSpans:
    """Makes the spans of all requests of one engine."""

    def __init__(self, client_id: Callable[[str], str | None]) -> None:
        """Use the exporter that vLLM has set up.

        Args:
            client_id: the engine's id of a live request to the front end's; None if it has gone.
        """
        self._client_id = client_id
        self._tracer: Tracer = trace.get_tracer("memshare")
        self._open: dict[str, Span] = {}
        self._blocks: Counter[str] = Counter()  # given up, by request

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
        self._open[request_id] = span
        times: RequestStateStats | None = None
        try:
            async for output in start(context):
                if isinstance(output.metrics, RequestStateStats):
                    times = output.metrics
                yield output
        except Exception as error:
            span.record_exception(error)
            span.set_status(Status(StatusCode.ERROR, str(error)))
            raise
        finally:
            del self._open[request_id]
            if times is not None:
                self._add_phases(span, times)
            span.set_attribute("memshare.blocks_reclaimed", self._blocks.pop(request_id, 0))
            span.end()

    def record(self, step: Step) -> None:
        """Note on the spans what MemShare and vLLM did to their requests in an engine step."""
        if step.payload is None or not self._open:
            return
        remaps: defaultdict[Span, list[RemapNote]] = defaultdict(list)
        for remap in map(RemapNote._make, step.payload["remaps"]):
            name = self._client_id(remap.request)
            if name is not None and name in self._open:
                remaps[self._open[name]].append(remap)
                self._blocks[name] += 1
        for span, notes in remaps.items():
            span.add_event(
                "memshare.reclaimed",
                {
                    "memshare.targets": [note.target for note in notes],
                    "memshare.donors": [note.donor for note in notes],
                },
                _nanoseconds(notes[-1].time),
            )
        for preempted in map(PreemptionNote._make, step.payload["preempted"]):
            preempted_span = self._open.get(self._client_id(preempted.request) or "")
            if preempted_span is not None:
                preempted_span.add_event(
                    "memshare.preempted",
                    {"memshare.blocks": preempted.blocks},
                    _nanoseconds(preempted.time),
                )

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
