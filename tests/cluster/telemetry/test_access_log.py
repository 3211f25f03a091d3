"""The access log: one line for each request and call, with what an operator looks for."""

from __future__ import annotations

import asyncio
import logging
import re
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from ray.serve.exceptions import gRPCStatusError
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from cluster.http.asgi import DisconnectOnCancel, KeyGate
from cluster.telemetry.serve_logs import log_no_calls, log_no_refusals
from memshare.client import NotAllowedError, NotFoundError, Sampling
from tests.cluster.grpc.test_service import serving
from tests.cluster.support.gates import CHAT, bearer, client_of, gate_for, ok


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Any:
    """Returns the lines so far, and forgets them; without their times."""
    caplog.set_level(logging.INFO, "ray.serve")

    def take() -> list[str]:
        found = [r.getMessage() for r in caplog.records if r.name == "ray.serve"]
        caplog.clear()
        assert all(re.search(r" \d+\.\d+ms$", line) for line in found), found
        return [line.rpartition(" ")[0] for line in found]

    return take


async def test_http_requests_are_logged_with_path_status_and_tenant(
    tmp_path: Path, lines: Any
) -> None:
    client = client_of(gate_for(tmp_path, acme={"concurrent_requests": 1}), ok)
    await client.post(CHAT, headers=bearer("acme"))
    await client.get("/v1/models?x=y", headers=bearer("acme"))
    await client.get("/health")
    await client.post(CHAT)
    await client.get("/metrics", headers=bearer("acme"))
    assert lines() == [
        f"POST {CHAT} 200 tenant=acme",
        "GET /v1/models 200 tenant=acme",
        "GET /health 200 tenant=-",
        f"POST {CHAT} 401 tenant=-",
        "GET /metrics 403 tenant=acme",
    ]


async def test_no_path_forges_a_line_or_fills_the_log(tmp_path: Path, lines: Any) -> None:
    client = client_of(gate_for(tmp_path, acme={}), ok)
    await client.get("/x%0aPOST%20/v1%20200%20tenant=root%1b[0m%e2%80%a8")
    await client.get("/" + "y" * 3000)
    forged, long = lines()
    assert forged == "GET /x%0APOST%20/v1%20200%20tenant=root%1B%5B0m%E2%80%A8 401 tenant=-"
    assert len(long) < 300


async def test_an_answer_that_a_client_left_is_told_from_a_whole_one(lines: Any) -> None:
    from tests.cluster.support.gates import open_gate

    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        await asyncio.Event().wait()

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        pass

    scope = {
        "type": "http", "method": "POST", "path": CHAT, "headers": [], "client": ("127.0.0.1", 1),
    }  # fmt: skip
    request = asyncio.create_task(KeyGate(endless, open_gate())(scope, receive, send))
    await asyncio.sleep(0.02)
    request.cancel()
    await asyncio.gather(request, return_exceptions=True)
    assert lines() == [f"POST {CHAT} 200 aborted tenant=local"]


async def test_grpc_calls_are_logged_with_the_requests_id_in_the_engine(
    tmp_path: Path, lines: Any
) -> None:
    async with serving(gate_for(tmp_path, acme={})) as server:
        async with server.client(key="acme", retries=0) as client:
            await client.generate("x", request_id="mine")
            async with client.chat_stream([("user", "x")], Sampling(ignore_eos=True)) as stream:
                async for _ in stream:
                    break
            await asyncio.wait_for(server.engine.idle.wait(), 60)
            with pytest.raises(NotFoundError):
                await client.model_info("other")
        async with server.client(retries=0) as nobody:
            with pytest.raises(NotAllowedError):
                await nobody.generate("x")
        async with grpc.aio.insecure_channel(server.address) as channel:
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    service = "gRPC /memshare.v1.MemShare"
    whole, streamed, info, refused, health = lines()
    assert re.fullmatch(rf"{service}/Generate OK tenant=acme request=grpc-mine-[0-9a-f]+", whole)
    assert re.fullmatch(rf"{service}/ChatStream - aborted tenant=acme request=grpc-\w+", streamed)
    assert info == f"{service}/GetModelInfo NOT_FOUND tenant=acme"
    assert refused == f"{service}/Generate UNAUTHENTICATED tenant=-"
    assert health == "gRPC /grpc.health.v1.Health/Check OK tenant=-"


async def test_what_a_line_tells_is_there_as_fields(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ray.serve")
    client = client_of(gate_for(tmp_path, acme={}), ok)
    await client.post(CHAT, headers=bearer("acme"))
    (record,) = caplog.records
    told = vars(record)
    assert (told["method"], told["path"], told["status"]) == ("POST", CHAT, "200")
    assert (told["tenant"], told["aborted"]) == ("acme", False)
    assert 0 <= told["duration_ms"] < 5000
    assert told["serve_access_log"] is True, "Serve's own option leaves it out"


async def test_ours_takes_the_place_of_ray_serves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ray.serve")
    serve = logging.getLogger("ray.serve")
    before = list(serve.filters)
    try:
        log_no_calls()
        serve.info("POST / 200 1.0ms", extra={"serve_access_log": True})
        serve.info("something else")
        await client_of(gate_for(tmp_path, acme={}), ok).get("/health")
    finally:
        serve.filters[:] = before
    assert [r.getMessage().split()[:2] for r in caplog.records] == [
        ["something", "else"],
        ["GET", "/health"],
    ]


def test_refused_calls_bring_no_tracebacks_and_faults_do(
    caplog: pytest.LogCaptureFixture,
) -> None:
    serve = logging.getLogger("ray.serve")
    before = list(serve.filters)
    refused = gRPCStatusError(ValueError("bad"), grpc.StatusCode.INVALID_ARGUMENT, "bad")
    try:
        log_no_refusals()
        for error in (refused, ValueError("a fault")):
            try:
                raise error
            except Exception:
                serve.exception("Request failed.")
    finally:
        serve.filters[:] = before
    assert "a fault" in caplog.text
    assert "bad" not in caplog.text


def test_ray_serves_proxies_learn_the_routes() -> None:
    """By them they log and count requests; else all are ``/``."""
    from ray.serve._private.thirdparty.get_asgi_route_name import extract_route_patterns

    app = Starlette(routes=[Route(CHAT, JSONResponse, methods=["POST"])])
    wrapped = DisconnectOnCancel(app, routes=app.routes)
    assert [p.path for p in extract_route_patterns(wrapped)] == [CHAT]
