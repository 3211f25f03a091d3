"""``serve run configs/cluster.yaml``, a real model and real clients. One server for all tests.

The tests are in the order of the server's life: the last ones kill its engine and shut it down.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import psutil
import pytest
import ray
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletionMessageParam
from ray import serve
from ray.serve.generated.serve_pb2 import HealthzRequest, ListApplicationsRequest
from ray.serve.generated.serve_pb2_grpc import RayServeAPIServiceStub

from cluster.check.ports import look_at_ports
from cluster.config import ReplicaConfig
from cluster.evaluator_pool import actor_name
from cluster.grpc_ingress import SERVICE
from cluster.routing.load import Load, from_stats
from memshare.cli.main import main
from memshare.client import (
    CallError,
    Client,
    FinishReason,
    InvalidRequestError,
    MemShareOptions,
    NotFoundError,
    OverloadedError,
    Sampling,
    TimedOutError,
    UnavailableError,
)
from memshare.proto import memshare_pb2 as pb
from memshare.proto.memshare_pb2_grpc import MemShareStub
from memshare.telemetry.metrics import BLOCKS, COUNTERS, GAUGES, HISTOGRAMS, METRICS
from tests.cluster.collector import Collector
from tests.cluster.faults import Old, Record, Stream, recover
from tests.cluster.lm_eval import run_lm_eval
from tests.cluster.loose import LOOSE
from tests.cluster.monitoring import (
    json_lines,
    look_at_page,
    node_metrics,
    serving_of,
    wait_for,
    writing,
)
from tests.documents import Block, blocks, chat_bodies
from tests.fuzzing import TIMES
from tests.machine import DTYPE
from tests.protobuf import damaged, requests
from tools.bench.local_cluster import (
    ROOT,
    START_S,
    Server,
    cluster_file,
    kill,
    memshare_in,
    processes,
    start,
    stop,
    victims,
)
from tools.serve_setup import QUESTION as FIRST_QUESTION

pytestmark = [pytest.mark.cluster, pytest.mark.engine]

QUESTION: list[ChatCompletionMessageParam] = [
    {"role": "user", "content": "Tell me a long story about a lighthouse."}
]


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.stop()


@pytest.fixture(scope="module")
def server(
    ray_address: str, collector: Collector, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    document = cluster_file()
    memshare_in(document).update(LOOSE)
    memshare_in(document)["logs"] = {"format": "json", "explain_every_s": 1.0}
    arguments = document["applications"][0]["args"]
    arguments["page"] = {"show_text": True}
    arguments["replica"]["body_timeout_s"] = 4.0
    arguments["auth"] = {"without_keys": {"requests_per_connection": 24}}
    arguments["engine"]["dtype"] = DTYPE
    arguments["engine"]["extra"] = {"otlp_traces_endpoint": collector.url}
    server = start(tmp_path_factory.mktemp("serve"), document)
    try:
        server.started_s = server.wait_until_it_answers()
        print(f"\nstarted in {server.started_s:.1f} s")
        yield server
    finally:
        stop(server)


@pytest.mark.usefixtures("ray_address")
def test_a_wrong_file_says_what_to_do_before_anything_is_loaded(tmp_path: Path) -> None:
    document = cluster_file()
    document["applications"][0]["args"]["engine"]["max_seqs"] = 8
    server = start(tmp_path, document)
    try:
        end = time.monotonic() + START_S
        while "did you mean 'max_num_seqs'?" not in server.log.read_text():
            assert time.monotonic() < end, server.log.read_text()[-4000:]
            assert processes("VLLM::") == []
            time.sleep(0.2)
    finally:
        stop(server)


def test_chat_whole_and_streamed(server: Server) -> None:
    whole = server.client.chat.completions.create(
        model="smollm2", messages=QUESTION, max_tokens=12, temperature=0
    )
    chunks = server.client.chat.completions.create(
        model="smollm2", messages=QUESTION, max_tokens=12, temperature=0, stream=True
    )
    streamed = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 12
    assert "".join(streamed) == whole.choices[0].message.content
    assert sum(bool(piece) for piece in streamed) >= 8, "tokens come one by one"


def test_the_first_question_is_answered_rightly_on_any_cpu(server: Server) -> None:
    """What ``make serve`` prints. bfloat16 moves log-probabilities of this model by about 0.1."""
    choice = (
        server.client.chat.completions.create(
            model="smollm2",
            messages=[{"role": "user", "content": FIRST_QUESTION}],
            max_tokens=24,
            temperature=0,
            logprobs=True,
            top_logprobs=2,
        )
    ).choices[0]
    assert choice.message.content is not None
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert "Tokyo" in choice.message.content
    assert choice.finish_reason == "stop"
    for token in choice.logprobs.content:
        best, second = token.top_logprobs
        assert best.logprob - second.logprob > 0.4, f"{best.token!r} or {second.token!r}"


@pytest.mark.parametrize("stream", [False, True])
def test_a_wrong_option_of_a_request_is_a_400(server: Server, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.client.chat.completions.create(
            model="smollm2",
            messages=QUESTION,
            stream=stream,
            extra_body={"vllm_xargs": {"memshare_step_threshold": 3}},
        )
    assert "vllm_xargs.memshare_step_threshold = 3" in str(caught.value)
    assert "0..1" in str(caught.value)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("field", "more"),
    [
        ("request_id", {"extra_headers": {"X-Request-Id": "x" * 300}}),
        ("request_id", {"extra_headers": {"X-Request-Id": "two words"}}),
        ("kv_transfer_params", {"extra_body": {"kv_transfer_params": {"do_remote_decode": True}}}),
    ],
)
def test_what_only_operators_may_choose_is_a_400(
    server: Server, stream: bool, field: str, more: dict[str, Any]
) -> None:
    with pytest.raises(openai.BadRequestError, match=field):
        server.client.completions.create(model="smollm2", prompt="Hello", stream=stream, **more)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"n": 4000}, "more than the 128"),
        ({"vllm_xargs": {"memshare_step_threshold": True}}, "a number is wanted, not true"),
        ({"vllm_xargs": {"memshare_max_shared_fraction": "0.1"}}, "= '0.1': Input should be"),
        ({"structured_outputs": {"json": {"$ref": "#"}}}, "no text fits"),
        ({"structured_outputs": {"grammar": "root ::= root"}}, "no text fits"),
    ],
)
def test_what_a_request_may_not_ask_for_is_a_400(
    server: Server, more: dict[str, Any], text: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.client.completions.create(
            model="smollm2", prompt="Hello", max_tokens=8, extra_body=more
        )
    assert text in str(caught.value)


def test_a_refusal_is_no_traceback(server: Server) -> None:
    before = server.log.stat().st_size
    body = {"model": "smollm2", "messages": QUESTION, "max_tokens": 4, "cache_salt": "mine"}
    answer = httpx.post(f"{server.url}/v1/messages", json=body, timeout=60)
    assert answer.status_code == 400
    assert "leave cache_salt out" in answer.json()["error"]["message"]

    def told() -> str:
        with server.log.open() as log:
            log.seek(before)
            return text if "leave cache_salt out" in (text := log.read()) else ""

    assert "Traceback" not in wait_for("the refusal in the log", told)


def test_half_a_request_is_not_waited_for(server: Server) -> None:
    """Default times, but for the body's."""
    post = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    halves = {
        "nothing": b"",
        "head": post + b"X-Half: ",
        "body": post + b"Content-Type: application/json\r\nContent-Length: 99\r\n\r\n{",
    }
    host, _, port = server.url.removeprefix("http://").partition(":")
    connections = {name: socket.create_connection((host, int(port))) for name in halves}
    began, ended, answers = time.monotonic(), {}, {}
    for name, half in halves.items():
        connections[name].sendall(half)
    for name in ("body", "nothing", "head"):
        with connections[name] as connection:
            connection.settimeout(120)
            answers[name] = b"".join(iter(partial(connection.recv, 4096), b""))
        ended[name] = time.monotonic() - began
    print(f"\nclosed after {ended}")
    assert answers["body"].startswith(b"HTTP/1.1 408")
    assert b"did not arrive within 4 s" in answers["body"]
    assert 3.9 < ended["body"] < ended["nothing"] <= ended["head"]
    assert ended["nothing"] > 9
    assert (answers["nothing"], answers["head"]) == (b"", b"")


def test_ray_serve_lists_its_applications_to_nobody(server: Server) -> None:
    assert httpx.get(f"{server.url}/-/routes", timeout=60).status_code == 404
    assert httpx.get(f"{server.url}/-/healthz", timeout=60).status_code == 200
    with grpc.insecure_channel(server.grpc_address) as channel:
        ray_service = RayServeAPIServiceStub(channel)
        assert ray_service.Healthz(HealthzRequest(), timeout=60).message == "success"
        with pytest.raises(grpc.RpcError) as caught:
            ray_service.ListApplications(ListApplicationsRequest(), timeout=60)
        assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED


def test_a_check_of_the_machine_recognises_the_server(server: Server) -> None:
    found, runs = look_at_ports(serving_of(server))
    assert [finding.level for finding in found] == ["ok", "ok"], found
    assert all("a MemShare server answers there, model smollm2" in f.text for f in found)
    assert runs
    other, _ = look_at_ports(replace(serving_of(server), model="other"))
    assert [finding.level for finding in other] == ["warn", "warn"]


def test_a_client_may_name_its_request(server: Server) -> None:
    answer = server.client.completions.create(
        model="smollm2", prompt="Hello", max_tokens=1, extra_headers={"X-Request-Id": "mine-7"}
    )
    assert "mine-7" in answer.id


def test_a_right_option_of_a_request_is_taken(server: Server) -> None:
    answer = server.client.completions.create(
        model="smollm2",
        prompt="Hello",
        max_tokens=4,
        extra_body={"vllm_xargs": {"memshare": "off"}},
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 4


def test_metrics_are_on_the_http_port(server: Server) -> None:
    assert server.metric("vllm:generation_tokens_total") > 0
    assert server.metric("vllm:memshare_free_blocks") > 0


def test_a_chat_shows_blocks_found_verified_and_reclaimed(server: Server) -> None:
    assert_that_blocks_are_reclaimed(server)


def assert_that_blocks_are_reclaimed(server: Server) -> None:
    client = server.client
    for _ in range(4):
        answer = client.chat.completions.create(
            model="smollm2",
            messages=QUESTION,
            max_tokens=256,
            temperature=0,
            extra_body={"ignore_eos": True, "vllm_xargs": {"memshare_usage": "on"}},
        )
        usage = (answer.model_extra or {})["kv_transfer_params"]["memshare"]
        if usage["blocks_shared"]:
            break
    for what in ("candidates", "verified", "applied", "blocks_reclaimed"):
        assert server.metric(f"vllm:memshare_{what}_total") > 0, what
    assert 0 < usage["peak_kv_blocks"] <= -(-(256 + 40) // 32)


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
        max_tokens=300,
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


# ---- gRPC ----

GREEDY = Sampling(temperature=0, max_tokens=12)
ENDLESS = Sampling(max_tokens=3900, ignore_eos=True)
PROMPT = "The lighthouse keeper counted the waves: one, two,"


def test_grpc_streamed_whole_and_http_give_the_same_tokens(server: Server) -> None:
    sampled = Sampling(temperature=0.7, top_p=0.9, seed=11, max_tokens=12, logprobs=2)
    with server.grpc_client() as client:
        for sampling in (GREEDY, sampled):
            whole = client.generate(PROMPT, sampling)
            pieces = list(client.generate_stream(PROMPT, sampling))
            assert [i for piece in pieces for i in piece.token_ids] == list(whole.token_ids)
            assert "".join(piece.text for piece in pieces) == whole.text
            assert len(pieces) >= 8, "tokens come one by one"
            body = {
                "model": "smollm2", "prompt": PROMPT, "max_tokens": 12, "return_token_ids": True,
                "temperature": sampling.temperature,
            }  # fmt: skip
            if sampling is sampled:
                body |= {"top_p": 0.9, "seed": 11, "logprobs": 2}
            (choice,) = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()[
                "choices"
            ]
            assert list(whole.token_ids) == choice["token_ids"]
            assert whole.text == choice["text"]
        chosen = [position.chosen.logprob for position in whole.logprobs]
        assert chosen == pytest.approx(choice["logprobs"]["token_logprobs"], abs=1e-4)
        ids = httpx.post(
            f"{server.url}/tokenize", json={"model": "smollm2", "prompt": PROMPT}, timeout=60
        ).json()["tokens"]
        assert client.generate(ids, GREEDY).text == client.generate(PROMPT, GREEDY).text


def test_grpc_chat_is_the_chat_over_http(server: Server) -> None:
    over_http = server.client.chat.completions.create(
        model="smollm2", messages=QUESTION, max_tokens=12, temperature=0
    )
    conversation = [("user", "Tell me a long story about a lighthouse.")]
    with server.grpc_client() as client:
        whole = client.chat(conversation, GREEDY)
        pieces = list(client.chat_stream(conversation, GREEDY))
    assert whole.message.content == over_http.choices[0].message.content
    assert "".join(piece.delta.content for piece in pieces) == whole.message.content
    assert whole.message.role == pieces[0].delta.role == "assistant"
    assert over_http.usage is not None
    for usage in (whole.usage, pieces[-1].usage):
        assert usage.prompt_tokens == over_http.usage.prompt_tokens
        assert usage.completion_tokens == 12
        assert usage.memshare.peak_kv_blocks == -(-(usage.prompt_tokens + 11) // 32)
    assert whole.finish.reason == FinishReason.FINISH_REASON_LENGTH


def test_usage_over_grpc(server: Server) -> None:
    with server.grpc_client() as client:
        exact = client.generate(PROMPT, GREEDY, memshare=MemShareOptions(enabled=False))
        assert exact.usage.memshare.blocks_shared == 0
        assert exact.usage.memshare.peak_kv_blocks > 0
        stopped = client.generate(PROMPT, Sampling(stop=[" "], max_tokens=50))
        assert stopped.finish.stop_string == " "
        assert not stopped.usage.HasField("memshare"), "documented: ended outside the engine"


def test_grpc_tells_of_model_and_replica(server: Server) -> None:
    with server.grpc_client() as client:
        info, stats = client.model_info(), client.stats()
        assert (info.model, info.max_model_len, info.block_size) == ("smollm2", 4096, 32)
        assert info.kv_blocks > 100
        assert info.memshare_mode == "share"
        assert stats.generation_tokens > 0
        assert stats.memshare["applied"] > 0
        assert "Engine" in stats.replica_id or stats.replica_id
    assert main(["chat", "--address", server.grpc_address, "--max-tokens", "4", "Hello"]) == 0


def test_the_demo_tells_how_the_server_fares(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["demo", "--address", server.grpc_address, "--stories", "3", "--tokens", "200"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "3 stories of 200 tokens want about 24 KV blocks; smollm2 has" in printed
    (*_, last) = (line for line in printed.splitlines() if "blocks reclaimed" in line)
    told = re.search(r"(\d+) tokens .* (\d+) blocks reclaimed, 0 preemptions", last)
    assert told is not None, last
    assert int(told[2]) > 0, "the options are loose"
    assert printed.count("| 200 | ") == 3


def test_a_grpc_call_that_ends_early_frees_the_engine(server: Server) -> None:
    with server.grpc_client() as client:
        with pytest.raises(TimedOutError):
            client.generate(PROMPT, ENDLESS, timeout=2)
        server.wait_until_idle(timeout_s=120)
        with client.chat_stream([("user", "Hello")], ENDLESS) as stream:
            for _ in zip(range(4), stream, strict=False):
                pass
        server.wait_until_idle(timeout_s=120)
        stream = client.chat_stream([("user", "Hello")], ENDLESS, request_id="mine")
        pieces = iter(stream)
        next(pieces)
        assert client.abort("mine")
        *_, last = pieces
        assert last.finish.reason == FinishReason.FINISH_REASON_ABORT
        server.wait_until_idle(timeout_s=120)


def test_one_connection_does_not_hold_the_server_alone(server: Server) -> None:
    with server.grpc_client(retries=0) as greedy, server.grpc_client() as other:
        streams = [greedy.generate_stream(PROMPT, ENDLESS) for _ in range(24)]
        pieces = [iter(stream) for stream in streams]  # who drops one leaves its stream
        for piece in pieces:
            next(piece)
        with pytest.raises(OverloadedError, match="24 requests at one time") as limited:
            greedy.generate(PROMPT, GREEDY)
        assert limited.value.retry_after_s == 1.0
        began = time.monotonic()
        assert other.generate(PROMPT, Sampling(max_tokens=4)).usage.completion_tokens == 4
        print(f"\n4 tokens beside them: {time.monotonic() - began:.1f} s")
        for stream in streams:
            stream.cancel()
    server.wait_until_idle(timeout_s=120)


def test_wrong_grpc_requests_are_told_what_is_wrong(server: Server) -> None:
    with server.grpc_client() as client:
        with pytest.raises(InvalidRequestError, match="top_p"):
            client.generate(PROMPT, Sampling(top_p=2))
        with pytest.raises(InvalidRequestError, match=r"memshare\.step_threshold: is 3"):
            client.generate(PROMPT, memshare=MemShareOptions(step_threshold=3))
        with pytest.raises(InvalidRequestError, match="4096"):
            list(client.generate_stream([1] * 5000))
        with pytest.raises(InvalidRequestError, match="out of"):
            client.generate([4_000_000_000], GREEDY)
        for kwargs in ({"tokenize": True}, {"conversation": []}, {"chat_template": "x"}):
            with contextlib.suppress(InvalidRequestError):  # it may also do no harm
                client.chat([("user", "Hello")], GREEDY, template_kwargs=kwargs)
        with pytest.raises(NotFoundError, match="there is no 'gpt'"):
            list(client.chat_stream([("user", "Hello")], model="gpt"))


AGAIN_S = ReplicaConfig().unavailable_retry_after_s

FAIR = (grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)


@pytest.mark.complete
def test_any_grpc_message_is_answered_or_refused(server: Server) -> None:
    """No bad input is the server's fault, and it survives all of them."""
    methods = {method.name: method for method in SERVICE.methods}
    codes: Counter[grpc.StatusCode] = Counter()

    def call(
        channel: grpc.Channel, name: str, data: bytes, *fair: grpc.StatusCode, timeout: float = 20
    ) -> None:
        replies = channel.unary_stream(f"/{SERVICE.full_name}/{name}")(data, timeout=timeout)
        with contextlib.suppress(grpc.RpcError):
            list(replies)
        code = replies.code()
        assert code in (*FAIR, *fair), f"{name} {data!r}: {code} {replies.details()}"
        codes[code] += 1

    @settings(
        max_examples=80 * TIMES,
        deadline=None,
        derandomize=TIMES == 1,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def fuzz(data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(["Generate", "GenerateStream", "Chat", "ChatStream"]))
        message = data.draw(requests(methods[name].input_type)).SerializeToString()
        call(channel, name, message)
        # It may have lost its limit of tokens.
        late = grpc.StatusCode.DEADLINE_EXCEEDED
        call(channel, name, data.draw(damaged(message)), late, timeout=2)

    with grpc.insecure_channel(server.grpc_address) as channel:
        fuzz()
        for name in methods:
            for garbage in (b"\xff" * 9, b"\x0a\xff", os.urandom(64)):
                call(channel, name, garbage)
    print(f"\n{dict(codes)}")
    assert codes[grpc.StatusCode.OK] > 5, "some are right by chance"
    assert codes[grpc.StatusCode.INVALID_ARGUMENT] > 10
    server.wait_until_idle(timeout_s=120)
    assert server.completes()


def test_health_and_reflection(server: Server) -> None:
    with grpc.insecure_channel(server.grpc_address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", SERVICE.full_name):
            answer = health.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflected = ProtoReflectionDescriptorDatabase(channel)
        assert {SERVICE.full_name, "grpc.health.v1.Health"} <= set(reflected.get_services())
        pool = DescriptorPool(reflected)
        methods = pool.FindServiceByName(SERVICE.full_name).methods_by_name
        assert methods["Chat"].input_type.full_name == "memshare.v1.ChatRequest"


FOREIGN = """
import sys, grpc, memshare_pb2, memshare_pb2_grpc
with grpc.insecure_channel(sys.argv[1]) as channel:
    stub = memshare_pb2_grpc.MemShareStub(channel)
    request = memshare_pb2.GenerateRequest(text=sys.argv[2])
    request.sampling.temperature = 0
    request.sampling.max_tokens = 12
    print("".join(chunk.text for chunk in stub.GenerateStream(request)), end="")
"""


def test_a_client_made_from_the_proto_alone_works(server: Server, tmp_path: Path) -> None:
    compiler = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'memshare' / 'proto'}"]
    outputs = [f"--python_out={tmp_path}", f"--grpc_python_out={tmp_path}", "memshare.proto"]
    subprocess.run([*compiler, *outputs], check=True)
    foreign = subprocess.run(
        [sys.executable, "-c", FOREIGN, server.grpc_address, PROMPT],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=True,
    )
    with server.grpc_client() as client:
        assert foreign.stdout == client.generate(PROMPT, GREEDY).text


def short(text: str) -> str:
    """An example of the documentation, with answers that do not take long."""
    return re.sub(r"max_tokens=\d+", "max_tokens=6", text)


SERVED = [block for block in blocks("python") if "lient" in block.text]


def test_the_example_of_a_grpc_client(server: Server) -> None:
    example = ROOT / "docs" / "examples" / "grpc_client.py"
    command = [sys.executable, example, "--address", server.grpc_address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    with server.grpc_client() as client:
        reply = client.generate("The capital of France is", Sampling(max_tokens=24, temperature=0))
    assert f"whole: {reply.text!r}, {reply.usage.completion_tokens} tokens" in done.stdout
    assert len(done.stdout.partition("stream:")[2].partition("exact:")[0].split()) >= 4
    assert re.search(r"^0 blocks shared, at most \d+ held$", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("block", SERVED, ids=lambda block: block.place)
def test_the_python_of_the_documentation_runs(server: Server, block: Block) -> None:
    text = short(block.text).replace("127.0.0.1:9000", server.grpc_address)
    exec(compile(text, block.place, "exec"), {"client": server.client})


@pytest.mark.parametrize(
    "body", chat_bodies(), ids=[f"body{i}" for i, _ in enumerate(chat_bodies())]
)
def test_the_requests_of_the_documentation_are_answered(
    server: Server, body: dict[str, Any]
) -> None:
    """By the model that is served here; some are for a plain vLLM server's name of it."""
    body = {**body, "model": "smollm2", "max_tokens": 6}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] > 0


@pytest.mark.complete
def test_lm_eval_asks_as_the_documentation_says(server: Server, tmp_path: Path) -> None:
    """Three problems, exactly, of which 24 tokens are written: the model is no reasoner."""
    samples = run_lm_eval(server.url, tmp_path, 3, {"memshare": "off"}, max_tokens=24)
    assert len(samples) == 3
    for sample in samples:
        asked: Any = sample.messages
        answer = server.client.chat.completions.create(
            model="smollm2", messages=asked, max_tokens=24, temperature=0,
            extra_body={"vllm_xargs": {"memshare": "off"}},
        )  # fmt: skip
        assert sample.text == answer.choices[0].message.content
        assert sample.problem in asked[0]["content"]


@pytest.mark.alone
@pytest.mark.complete
def test_requests_go_on_while_evaluators_die_and_come_back(server: Server) -> None:
    gaps: list[float] = []
    failures: list[Exception] = []

    def read() -> None:
        try:
            last = time.monotonic()
            for _ in server.client.completions.create(
                model="smollm2",
                prompt="Step 1: count the apples.\n\nStep 2: count the apples.\n\nStep 3:",
                max_tokens=150,
                stream=True,
                extra_body={"ignore_eos": True},
            ):
                gaps.append(time.monotonic() - last)
                last = time.monotonic()
        except openai.OpenAIError as error:
            failures.append(error)

    evaluator = ray.get_actor(actor_name(0), "memshare")
    readers = [threading.Thread(target=read) for _ in range(4)]
    for reader in readers:
        reader.start()
    time.sleep(2)
    ray.kill(evaluator)  # for good: the pool has to make another
    for reader in readers:
        reader.join()
    assert failures == []
    assert max(gaps) < 30, "no request stalls"
    answered = server.metric("vllm:memshare_evaluator_lag_seconds_count")
    end = time.monotonic() + 120
    while server.metric("vllm:memshare_evaluator_lag_seconds_count") <= answered:
        assert time.monotonic() < end, "stage one does not resume"
        read()
    assert failures == []


@pytest.mark.alone
@pytest.mark.complete
def test_a_killed_proxy_comes_back_and_engines_do_not_notice(
    server: Server, record_property: Record
) -> None:
    engine = victims("engine")
    stream = Stream(server)
    killed = kill("proxy")
    assert stream.is_told_of_its_end()
    recover(server, killed, record_property)
    assert victims("engine") == engine
    server.wait_until_idle(timeout_s=120)  # nobody reads that answer: it ends


@pytest.mark.alone
@pytest.mark.complete
def test_nobody_notices_that_the_controller_was_killed(
    server: Server, record_property: Record
) -> None:
    others = victims("engine") + victims("replica") + victims("proxy")
    stream = Stream(server, tokens=300)
    killed = kill("controller")
    assert not stream.is_told_of_its_end(), "the answer is whole"
    recover(server, killed, record_property)
    assert victims("engine") + victims("replica") + victims("proxy") == others


@pytest.mark.alone
@pytest.mark.complete
def test_a_killed_replica_is_replaced_and_sharing_resumes(
    server: Server, record_property: Record
) -> None:
    old = Old.of("engine", "worker", "replica")
    stream = Stream(server)
    killed = kill("replica")
    assert stream.is_told_of_its_end()
    recover(server, killed, record_property)
    old.assert_gone()
    assert_that_blocks_are_reclaimed(server)


@pytest.mark.alone
@pytest.mark.complete
def test_a_dead_engine_is_replaced(server: Server, record_property: Any) -> None:
    """Meanwhile everybody is told at once to come again, and when."""
    (engine,) = processes("VLLM::EngineCore")
    replica = engine.parent()
    old = Old.of("engine", "worker")
    whole: list[httpx.Response] = []
    errors: list[CallError] = []

    def ask() -> None:
        body = {"model": "smollm2", "messages": QUESTION, "max_tokens": 3900, "ignore_eos": True}
        whole.append(httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=300))

    def read() -> None:
        with server.grpc_client() as client, pytest.raises(CallError) as caught:
            list(client.generate_stream(PROMPT, ENDLESS))
        errors.append(caught.value)

    asking = [threading.Thread(target=work) for work in (ask, read)]
    for thread in asking:
        thread.start()
    stream = Stream(server)
    workers = engine.children(recursive=True)
    began = time.monotonic()
    engine.kill()
    for thread in asking:
        thread.join()
    # Requests of a dead engine fail at once, and may be tried again.
    assert [answer.status_code for answer in whole] == [503]
    assert whole[0].headers["retry-after"] == str(AGAIN_S)
    assert [type(error) for error in errors] == [UnavailableError]
    assert errors[0].retry_after_s == AGAIN_S
    assert stream.is_told_of_its_end()
    (said,) = [json.loads(event[6:])["error"] for event in stream.events if '"error"' in event]
    assert said["code"] == 503
    for error in (whole[0].json()["error"], said):
        assert error["message"].endswith(f"is being replaced; try again in {AGAIN_S} s")
    assert replica is not None
    replica.wait(timeout=30)
    noticed_s = time.monotonic() - began
    refused_s = refusals_until_it_serves(server, began)
    recovered_s = time.monotonic() - began
    print(f"\nnoticed in {noticed_s:.1f} s, served again after {recovered_s:.1f} s")
    print(f"{len(refused_s)} refusals meanwhile, the slowest in {max(refused_s):.1f} s")
    record_property("noticed_s", noticed_s)
    record_property("recovered_s", recovered_s)
    assert noticed_s < 30
    assert max(refused_s) < 20, "nobody waits for a new engine"
    assert not any(worker.is_running() for worker in workers)
    old.assert_gone()
    (again,) = processes("VLLM::EngineCore")
    assert again.pid != engine.pid


def refusals_until_it_serves(server: Server, began: float) -> list[float]:
    """How long each refusal took, in seconds, of ``/health``, a request and a gRPC call."""
    body = {"model": "smollm2", "prompt": "Hello", "max_tokens": 1}

    def by_http(method: str, path: str, **request: Any) -> bool:
        answer = httpx.request(method, f"{server.url}{path}", timeout=60, **request)
        if answer.status_code == 200:
            return True
        assert answer.status_code == 503
        told.add(float(answer.headers["retry-after"]))
        return False

    def by_grpc(client: Client) -> bool:
        try:
            client.model_info()
        except UnavailableError as error:
            told.add(error.retry_after_s)
            return False
        return True

    took: list[float] = []
    told: set[float | None] = set()
    with server.grpc_client(retries=0) as client:
        asks: list[Callable[[], bool]] = [
            partial(by_http, "GET", "/health"),
            partial(by_http, "POST", "/v1/completions", json=body),
            partial(by_grpc, client),
        ]
        for ask in cycle(asks):
            at = time.monotonic()
            assert at - began < START_S
            if ask():
                break
            took.append(time.monotonic() - at)
            time.sleep(0.2)
    assert told == {AGAIN_S}
    return took


def guards() -> list[psutil.Process]:
    """The shells that outlive our replicas by an instant; nobody's children."""
    groups = {str(replica.pid) for replica in victims("replica")}
    shells = [p for p in psutil.process_iter(["cmdline"]) if "memshare-guard" in p.info["cmdline"]]
    return [shell for shell in shells if shell.info["cmdline"][-1] in groups]


def test_shutdown_leaves_nothing_behind(server: Server) -> None:
    evaluator = ray.get_actor(actor_name(0), "memshare")
    pid = ray.get(evaluator.__ray_call__.remote(lambda _: os.getpid()))
    ours = [*processes("VLLM::", "ray::ServeReplica"), *guards(), psutil.Process(pid)]
    titles = {process.cmdline()[0] for process in ours}
    old = Old.of("engine", "worker", "replica")
    assert {"VLLM::EngineCore", "ray::ServeReplica:memshare:Engine", "/bin/sh"} <= titles
    stop(server)
    assert server.process.returncode == 0
    log = server.log.read_text()
    assert re.search(r"-- POST /v1/chat/completions 200 tenant=local \d+", log), "what was asked"
    assert re.search(r"-- gRPC /memshare.v1.MemShare/Chat OK tenant=local request=grpc-", log)
    assert "CALL report" not in log, "what replicas tell the page every second is not"
    assert "gRPCStatusError" not in log, "a call that was refused is one line"
    gone, alive = psutil.wait_procs(ours, timeout=90)
    assert alive == []
    assert len(gone) == len(ours)
    old.assert_gone()
