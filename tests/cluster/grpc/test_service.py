"""The gRPC methods and both clients over a real channel. Only the engine is a stand-in.

A server of grpcio takes the place of Ray Serve's proxy: it calls the methods in the same way.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import prometheus_client
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.config import MAX_REQUEST_BYTES, ClusterArgs
from cluster.grpc.service import GrpcService
from cluster.grpc.stats import stats
from cluster.grpc.status import StatusError, invalid
from cluster.grpc_ingress import add_health, add_memshare
from cluster.tenancy.gate import Gate
from memshare.cli.main import main
from memshare.client import (
    AsyncClient,
    CallError,
    Client,
    FinishReason,
    InvalidRequestError,
    NotAllowedError,
    NotFoundError,
    OverloadedError,
    Sampling,
    TimedOutError,
    UnavailableError,
)
from memshare.client.options import channel_options
from tests.cluster.support.gates import counted, gate_for, open_gate
from tests.stand_in import StandIn

ROOT = Path(__file__).resolve().parents[3]


class Server:
    """A listening service."""

    def __init__(self, engine: StandIn, address: str) -> None:
        self.engine = engine
        self.address = address

    def client(self, **options: Any) -> AsyncClient:
        return AsyncClient(self.address, **options)


@asynccontextmanager
async def serving(gate: Gate) -> AsyncIterator[Server]:
    engine, service = StandIn(), GrpcService()
    service._start_grpc(ClusterArgs(model="m"), gate, engine)  # type: ignore[arg-type]
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", 2**31 - 1)])
    add_memshare(service, server)  # type: ignore[arg-type]
    add_health(service, server)  # type: ignore[arg-type]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield Server(engine, f"127.0.0.1:{port}")
    finally:
        await server.stop(None)


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with serving(open_gate()) as server:
        yield server


async def test_streams_and_whole_replies_say_the_same(server: Server) -> None:
    async with server.client() as client:
        whole = await client.generate("Count", Sampling(temperature=0), request_id="mine")
        assert (whole.request_id, whole.model, whole.text) == ("mine", "m", "one two three")
        assert whole.usage.memshare.peak_kv_blocks == 1
        pieces = [piece async for piece in client.generate_stream([1, 2, 3])]
        assert "".join(piece.text for piece in pieces) == whole.text
        assert [piece.HasField("finish") for piece in pieces] == [False, False, True]
        assert pieces[-1].usage == whole.usage
        assert len({piece.request_id for piece in pieces}) == 1

        answer = await client.chat([("user", "Count"), {"role": "user", "content": "again"}])
        assert answer.message.content == whole.text
        assert answer.message.role == "assistant"
        deltas = [piece.delta async for piece in client.chat_stream([("user", "Count")])]
        assert [delta.role for delta in deltas] == ["assistant", "", ""]
        assert "".join(delta.content for delta in deltas) == whole.text
    prompts = [body.get("prompt", body.get("messages")) for body in server.engine.bodies]
    assert prompts[:2] == ["Count", [1, 2, 3]]
    assert [message["content"] for message in prompts[2]] == ["Count", "again"]


async def test_a_session_and_an_application_are_named_in_the_metadata(server: Server) -> None:
    async with server.client(session="s", app="a") as client:
        await client.generate("x")
    assert server.engine.metadata["session_id"] == "s"
    assert server.engine.metadata["application"] == "a"


@pytest.mark.parametrize("page", ["README.md", "docs/grpc.md"])
async def test_the_examples_in_the_documentation_run(server: Server, page: str) -> None:
    blocks = re.findall(
        r"^```python\n(.*?)^```$", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE
    )
    examples = [block for block in blocks if "memshare.client" in block]
    assert examples
    for example in examples:
        assert "127.0.0.1:9000" in example
        code = example.replace("127.0.0.1:9000", server.address)
        await asyncio.to_thread(exec, compile(code, page, "exec"), {})
    assert server.engine.bodies


async def test_the_client_for_ordinary_code_does_the_same(server: Server) -> None:
    def use() -> list[str]:
        with Client(server.address) as client:
            texts = [client.generate("x").text, client.chat([("user", "x")]).message.content]
            texts.append("".join(piece.text for piece in client.generate_stream("x")))
            texts.append(
                "".join(piece.delta.content for piece in client.chat_stream([("user", "x")]))
            )
            with client.generate_stream("x", Sampling(ignore_eos=True)) as stream:
                texts.append(next(iter(stream)).text)
            assert not client.abort("nobody")
            return texts

    assert await asyncio.to_thread(use) == ["one two three"] * 4 + ["one "]
    await asyncio.wait_for(server.engine.idle.wait(), 60)
    assert server.engine.running == {}


@pytest.mark.parametrize(
    ("failure", "expected", "text"),
    [
        (invalid("sampling.top_p", "is 2"), InvalidRequestError, "sampling.top_p: is 2"),
        (StatusError(grpc.StatusCode.RESOURCE_EXHAUSTED, "full"), OverloadedError, "full"),
        (StatusError(grpc.StatusCode.NOT_FOUND, "none"), NotFoundError, "none"),
        (StatusError(grpc.StatusCode.INTERNAL, "oh"), CallError, "INTERNAL"),
        pytest.param(  # whether it is one of vLLM's is looked up there
            RuntimeError("oh"), CallError, "INTERNAL", marks=pytest.mark.engine
        ),
    ],
)
async def test_a_failure_has_its_own_error(
    server: Server, failure: Exception, expected: type[CallError], text: str
) -> None:
    async with server.client(retries=0) as client:
        server.engine.failures = [failure, failure]
        with pytest.raises(expected, match=text):
            await client.generate("x")
        with pytest.raises(expected, match=text):
            async for _ in client.chat_stream([("user", "x")]):
                pass


async def test_large_requests_are_refused_before_they_are_read(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = ClusterArgs(model="m").replica.max_body_bytes
    async with server.client() as client:
        with pytest.raises(InvalidRequestError, match=f"more than {limit}; send a shorter prompt"):
            await client.generate("x" * limit)
        monkeypatch.setattr("cluster.grpc_ingress.MAX_REQUEST_BYTES", 1000)
        with pytest.raises(InvalidRequestError, match="has 1001 bytes, more than 1000"):
            await client.chat([("user", "x" * (1000 - 11))])
        assert (await client.generate("x" * 900)).text
    assert len(server.engine.bodies) == 1


async def test_who_has_no_key_is_not_told_about_sizes(tmp_path: Path) -> None:
    limit = ClusterArgs(model="m").replica.max_body_bytes
    async with serving(gate_for(tmp_path, acme={})) as server, server.client(retries=0) as nobody:
        for size in (limit, MAX_REQUEST_BYTES):
            with pytest.raises(NotAllowedError, match="a key is needed"):
                await nobody.generate("x" * size)


async def test_the_engines_id_tells_the_callers(server: Server) -> None:
    async with server.client() as client:
        async with client.generate_stream(
            "x", Sampling(ignore_eos=True), request_id="mine"
        ) as stream:
            async for piece in stream:
                assert piece.request_id == "mine"
                (engine_id,) = server.engine.running
                assert engine_id.startswith("grpc-mine-")
                break
        await asyncio.wait_for(server.engine.idle.wait(), 60)


async def test_an_unavailable_server_is_asked_again_for_whole_replies_only(server: Server) -> None:
    down = StatusError(grpc.StatusCode.UNAVAILABLE, "the engine has died")
    async with server.client(retries=1) as client:
        server.engine.failures = [down]
        assert (await client.generate("x")).text == "one two three"
        assert len(server.engine.bodies) == 2
        server.engine.failures = [down, down]
        with pytest.raises(UnavailableError, match="the engine has died"):
            await client.generate("x")
        server.engine.failures = [down]
        with pytest.raises(UnavailableError):
            async for _ in client.generate_stream("x"):
                pass


async def test_nobody_there_is_unavailable() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        async with AsyncClient(f"127.0.0.1:{unused.getsockname()[1]}", retries=0) as client:
            with pytest.raises(UnavailableError):
                await client.generate("x")


def test_more_retries_than_grpc_makes_are_refused() -> None:
    with pytest.raises(ValueError, match="retries = 5: give a number from 0 to 4"):
        channel_options(5)


async def test_a_deadline_ends_the_work(server: Server) -> None:
    async with server.client() as client:
        with pytest.raises(TimedOutError):
            await client.generate("x", Sampling(ignore_eos=True), timeout=0.5)
        await asyncio.wait_for(server.engine.idle.wait(), 60)
        assert server.engine.running == {}


async def test_a_reader_that_stops_ends_the_work(server: Server) -> None:
    async with server.client() as client:
        async with client.generate_stream("x", Sampling(ignore_eos=True)) as stream:
            async for piece in stream:
                assert piece.text == "one "
                break
        await asyncio.wait_for(server.engine.idle.wait(), 60)
        assert server.engine.running == {}


async def test_abort_ends_a_request_with_what_it_has_written(server: Server) -> None:
    async with server.client() as client:
        pieces = client.generate_stream("x", Sampling(ignore_eos=True), request_id="r").__aiter__()
        assert (await anext(pieces)).text == "one "
        with pytest.raises(InvalidRequestError, match="request_id: 'r' is running"):
            await client.generate("x", request_id="r")
        assert await client.abort("r")
        *_, last = [piece async for piece in pieces]
        assert last.finish.reason == FinishReason.FINISH_REASON_ABORT
        assert not await client.abort("r"), "it has ended"
        assert (await client.generate("x", request_id="r")).text == "one two three"
        with pytest.raises(InvalidRequestError, match="request_id: is empty"):
            await client.abort("")


async def test_keys(tmp_path: Path) -> None:
    gate = gate_for(tmp_path, acme={"concurrent_requests": 1}, rival={}, boss={"operator": True})
    async with serving(gate) as server:
        async with server.client() as nobody, server.client(key="wrong") as stranger:
            for client in (nobody, stranger):
                for call in (client.generate("x"), client.model_info(), client.abort("r")):
                    with pytest.raises(NotAllowedError, match="UNAUTHENTICATED"):
                        await call
        async with server.client(key="acme") as acme, server.client(key="rival") as rival:
            pieces = acme.generate_stream("x", Sampling(ignore_eos=True), request_id="r")
            running = pieces.__aiter__()
            await anext(running)
            with pytest.raises(OverloadedError, match="1 requests at one time"):
                await acme.generate("x")
            assert not await rival.abort("r"), "it is another tenant's"
            assert (await rival.generate("x", request_id="r")).text == "one two three"
            with pytest.raises(NotAllowedError, match=r"PERMISSION_DENIED.*operators"):
                await rival.stats()
            assert await acme.abort("r")
            *_, last = [piece async for piece in running]
            assert last.finish.reason == FinishReason.FINISH_REASON_ABORT
        assert server.engine.running == {}


async def test_calls_are_counted_by_how_they_end(tmp_path: Path) -> None:
    gate = gate_for(tmp_path, acme={})
    async with serving(gate) as server, server.client(key="acme", retries=0) as acme:
        await acme.generate("x")
        bad = StatusError(grpc.StatusCode.INTERNAL, "oh")
        server.engine.failures = [invalid("sampling.top_p", "is 2"), bad]
        for _ in range(2):
            with pytest.raises(CallError):
                await acme.generate("x")
        with pytest.raises(TimedOutError):
            await acme.generate("x", Sampling(ignore_eos=True), timeout=0.5)
        await asyncio.wait_for(server.engine.idle.wait(), 60)
    counts = [counted(gate, "tenant_requests", "acme", o) for o in ("served", "failed", "aborted")]
    assert counts == [2, 1, 1]


async def test_a_closed_gate_lets_streams_finish_and_refuses_newcomers() -> None:
    gate = open_gate()
    async with serving(gate) as server, server.client(retries=0) as client:
        running = client.generate_stream("x", Sampling(ignore_eos=True), request_id="first")
        pieces = aiter(running)
        await anext(pieces)
        assert await _health(server) == health_pb2.HealthCheckResponse.SERVING
        gate.close(retry_after_s=7)
        with pytest.raises(UnavailableError, match="try again in 7 s"):
            await client.generate("x")
        assert await _health(server) == health_pb2.HealthCheckResponse.NOT_SERVING
        await anext(pieces)
        assert gate.under_way == 1
        running.cancel()
        await asyncio.wait_for(server.engine.idle.wait(), 60)


async def _health(server: Server) -> int:
    async with grpc.aio.insecure_channel(server.address) as channel:
        reply = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        return int(reply.status)


async def test_memshare_demo_says_what_to_start(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["demo", "--address", "127.0.0.1:1"]  # nobody listens there
    assert await asyncio.to_thread(main, words) == 1
    printed = capsys.readouterr().err
    assert "memshare demo: error: UNAVAILABLE" in printed
    assert "make serve CONFIG=configs/demo.yaml" in printed


async def test_memshare_chat_answers_one_question(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["chat", "Count", "--address", server.address, "--system", "Be brief.", "--seed", "0"]
    assert await asyncio.to_thread(main, words) == 0
    printed = capsys.readouterr()
    assert printed.out == "one two three\n"
    assert "3 + 2 tokens" in printed.err
    assert "peak 1 KV blocks, 0 shared" in printed.err
    (body,) = server.engine.bodies
    assert [message["content"] for message in body["messages"]] == ["Be brief.", "Count"]
    assert body["seed"] == 0
    assert "temperature" not in body


async def test_memshare_chat_keeps_a_conversation_without_what_failed(
    server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["first", "second", "", "/new", "third", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    server.engine.failures = [invalid("messages", "no")]
    assert await asyncio.to_thread(main, ["chat", "--address", server.address]) == 0
    printed = capsys.readouterr().err
    assert "error: INVALID_ARGUMENT" in printed
    assert "messages: no" in printed
    asked = [[m["content"] for m in body["messages"]] for body in server.engine.bodies]
    assert asked == [["first"], ["second"], ["third"]]


async def test_memshare_chat_says_what_is_wrong(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.engine.failures = [StatusError(grpc.StatusCode.NOT_FOUND, "model: there is no 'x'")]
    words = ["chat", "Hi", "--address", server.address, "--model", "x"]
    assert await asyncio.to_thread(main, words) == 1
    printed = capsys.readouterr().err
    assert "memshare chat: error: NOT_FOUND" in printed
    assert "there is no 'x'" in printed


async def test_bytes_that_are_no_message_are_refused(server: Server) -> None:
    async with grpc.aio.insecure_channel(server.address) as channel:
        for method in ("memshare.v1.MemShare/Generate", "grpc.health.v1.Health/Check"):
            call = channel.unary_unary(f"/{method}")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(b"\xff\xff\xff")
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert "its bytes are no" in (caught.value.details() or "")


async def test_health(server: Server) -> None:
    async with grpc.aio.insecure_channel(server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        request, status = health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse
        for service in ("", "memshare.v1.MemShare", "grpc.health.v1.Health"):
            assert (await health.Check(request(service=service))).status == status.SERVING
        listed = await health.List(health_pb2.HealthListRequest())
        assert set(listed.statuses) == {"", "memshare.v1.MemShare", "grpc.health.v1.Health"}
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health.Check(request(service="nothing"))
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in health.Watch(request()):
                pass
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
        server.engine.has_died = True
        assert (await health.Check(request())).status == status.NOT_SERVING


def test_stats_add_up_what_metrics_show() -> None:
    registry = prometheus_client.CollectorRegistry()
    running = prometheus_client.Gauge("vllm:num_requests_running", "-", ["e"], registry=registry)
    running.labels("0").set(2)
    running.labels("1").set(3)
    prometheus_client.Counter("vllm:memshare_applied", "-", registry=registry).inc(7)
    prometheus_client.Gauge("vllm:memshare_free_blocks", "-", registry=registry).set(9)
    answer = stats("r0", registry)
    assert answer.replica_id == "r0"
    assert answer.requests_running == 5
    assert dict(answer.memshare) == {"applied": 7, "free_blocks": 9}
