"""What can be seen of a server from outside: metrics, page, spans, logs."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import ray
from ray import serve

from cluster.routing.load import Load, from_stats
from memshare.proto import memshare_pb2 as pb
from memshare.proto.memshare_pb2_grpc import MemShareStub
from memshare.telemetry.metrics import BLOCKS, COUNTERS, GAUGES, HISTOGRAMS, METRICS
from tests.cluster.serve.support import PROMPT, QUESTION, assert_that_blocks_are_reclaimed
from tests.cluster.support.collector import Collector
from tests.cluster.support.monitoring import (
    json_lines,
    look_at_page,
    node_metrics,
    wait_for,
    writing,
)
from tools.bench.local_cluster import (
    Server,
    processes,
)

pytestmark = [pytest.mark.cluster, pytest.mark.engine]


def test_a_chat_shows_blocks_found_verified_and_reclaimed(server: Server) -> None:
    assert_that_blocks_are_reclaimed(server)
    with server.grpc_client() as client:
        assert client.stats().memshare["applied"] > 0


def test_a_replica_reports_its_load(server: Server) -> None:
    engine = serve.get_deployment_handle("Engine", "memshare")

    def load() -> Load:
        reported = from_stats(engine.record_autoscaling_stats.remote().result(timeout_s=60))
        assert reported is not None
        return reported

    with contextlib.closing(
        server.client.completions.create(
            model="smollm2",
            prompt="Hello",
            max_tokens=2000,
            stream=True,
            extra_body={"ignore_eos": True},
        )
    ) as stream:
        for _ in zip(range(4), stream, strict=False):
            pass
        busy = load()
    assert (busy.running, busy.waiting, busy.slots) == (1, 0, 32)
    assert 0 < busy.used < busy.demand < 0.1
    server.wait_until_idle(timeout_s=120)
    assert load().requests == 0


def test_the_page_shows_what_a_replica_does(server: Server, chromium: str, tmp_path: Path) -> None:
    request = {"model": "smollm2", "messages": QUESTION, "max_tokens": 3000, "temperature": 0}
    with writing(server.client, **request, extra_body={"ignore_eos": True}):
        look_at_page(server.url, chromium, tmp_path, "lighthouse")


def test_metrics_have_both_spellings_and_the_policy(server: Server) -> None:
    http, node = httpx.get(f"{server.url}/metrics", timeout=60).text, node_metrics()
    for metric in (*COUNTERS.values(), *GAUGES.values(), *HISTOGRAMS.values(), BLOCKS):
        suffix = "_count" if metric.kind == "histogram" else ""
        shown = re.findall(rf"^{metric.prometheus}{suffix}\{{(.*)\}} ", http, re.MULTILINE)
        assert shown, metric.prometheus
        assert all('policy="paper"' in labels for labels in shown)
    used = ("applied", "blocks_reclaimed", "free_blocks", "blocks")
    for name in used:  # Ray exports a metric once it has been counted
        spelled = next(metric.ray for metric in METRICS if metric.name == name)
        shown = re.findall(rf"^{spelled}\{{(.*)\}} ", node, re.MULTILINE)
        assert shown, f"{spelled} is not on the node's port"
        assert all("ReplicaId=" in labels for labels in shown)


def test_spans_show_a_requests_way_and_its_reclaims(server: Server, collector: Collector) -> None:
    trace, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    server.client.chat.completions.create(
        model="smollm2",
        messages=QUESTION,
        max_tokens=120,
        temperature=0,
        extra_body={"ignore_eos": True},
        extra_headers={"traceparent": f"00-{trace}-{parent}-01"},
    )
    names = {f"memshare.{part}" for part in ("request", "queue", "prefill", "decode")}
    spans = wait_for(
        "all spans",
        lambda: (got := collector.spans(trace)).keys() >= {*names, "llm_request"} and got,
    )
    request = spans["memshare.request"]
    assert request.parent_span_id.hex() == parent
    for name in (*(names - {"memshare.request"}), "llm_request"):
        assert spans[name].parent_span_id == request.span_id, name
    assert any(event.name == "memshare.reclaimed" for event in request.events)
    seconds = {n: (s.end_time_unix_nano - s.start_time_unix_nano) / 1e9 for n, s in spans.items()}
    assert seconds["memshare.prefill"] + seconds["memshare.decode"] < seconds["memshare.request"]
    assert seconds["memshare.decode"] > 0.5 * seconds["memshare.request"]


def test_a_grpc_call_brings_its_trace_too(server: Server, collector: Collector) -> None:
    trace, parent = "a1b2c3d4e5f60718293a4b5c6d7e8f90", "00f067aa0ba902b7"
    metadata = [("traceparent", f"00-{trace}-{parent}-01")]
    request = pb.GenerateRequest(text=PROMPT, request_id="traced")
    with grpc.insecure_channel(server.grpc_address) as channel:
        MemShareStub(channel).Generate(request, metadata=metadata, timeout=60)
    spans = wait_for(
        "both spans",
        lambda: (
            (got := collector.spans(trace)).keys() >= {"memshare.request", "llm_request"} and got
        ),
    )
    span = spans["memshare.request"]
    assert span.parent_span_id.hex() == parent
    (name,) = (a.value.string_value for a in span.attributes if a.key == "gen_ai.request.id")
    assert name.startswith("grpc-traced-")


def test_reclaims_are_explained_in_json_lines(server: Server) -> None:
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    lines = wait_for(
        "a line that explains reclaims",
        lambda: [line for line in json_lines(session) if line.get("event") == "reclaimed"],
    )
    assert all(sum(line["requests"].values()) == line["blocks"] > 0 for line in lines)
    assert any("the trigger is eager" in line["causes"] for line in lines)


@pytest.mark.complete
def test_a_board_that_dies_stops_nothing_and_comes_back(server: Server) -> None:
    (board,) = processes("ray::ServeReplica:memshare:Board")
    board.kill()
    assert server.completes()

    def state() -> Any:
        try:
            answer = httpx.get(f"{server.url}/memshare/api/state", timeout=30)
        except httpx.TransportError:
            return None
        return answer.status_code == 200 and answer.json()["replicas"]

    (replica,) = wait_for("the page", state, 120)
    assert replica["samples"], "what was missed came later"
    assert server.completes()


def test_a_client_that_leaves_frees_the_engine(server: Server) -> None:
    body = {"model": "smollm2", "messages": QUESTION, "max_tokens": 3900, "ignore_eos": True}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=3)
    server.wait_until_idle(timeout_s=120)
    with httpx.stream(
        "POST", f"{server.url}/v1/chat/completions", json={**body, "stream": True}, timeout=60
    ) as answer:
        for _ in zip(range(6), answer.iter_lines(), strict=False):
            assert answer.status_code == 200
    server.wait_until_idle(timeout_s=120)
