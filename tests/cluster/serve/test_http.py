"""What clients ask over HTTP, and what is refused."""

from __future__ import annotations

import socket
import time
from dataclasses import replace
from functools import partial
from typing import Any

import grpc
import httpx
import openai
import pytest
from ray.serve.generated.serve_pb2 import HealthzRequest, ListApplicationsRequest
from ray.serve.generated.serve_pb2_grpc import RayServeAPIServiceStub

from cluster.check.ports import look_at_ports
from tests.cluster.serve.support import QUESTION
from tests.cluster.support.monitoring import serving_of, wait_for
from tools.bench.local_cluster import Server
from tools.serving.setup import QUESTION as FIRST_QUESTION

pytestmark = [pytest.mark.cluster, pytest.mark.engine]


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
