"""What is amended in the answers of Ray Serve's proxy, over a real channel.

A service that fails as Ray Serve's handlers do, by a status on the context, takes its place.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from ray.exceptions import ActorDiedError
from ray.serve._private.grpc_util import start_grpc_server
from ray.serve.config import gRPCOptions
from ray.serve.generated.serve_pb2 import (
    HealthzRequest,
    HealthzResponse,
    ListApplicationsRequest,
)
from ray.serve.generated.serve_pb2_grpc import RayServeAPIServiceStub

from cluster.grpc_ingress import SERVICE, add_memshare
from cluster.routing.outage import try_again
from cluster.tenancy.limits import LimitReachedError
from memshare.client import AsyncClient, CallError, OverloadedError, UnavailableError
from memshare.proto import memshare_pb2 as pb

Fail = Callable[[Any], None]
Ask = Callable[[AsyncClient], Awaitable[object]]


async def whole(client: AsyncClient) -> object:
    return await client.generate("x")


async def streamed(client: AsyncClient) -> object:
    return [piece async for piece in client.generate_stream("x")]


@pytest.fixture(params=[whole, streamed])
def ask(request: pytest.FixtureRequest) -> Ask:
    return request.param  # type: ignore[no-any-return]


def servicer(**methods: Any) -> SimpleNamespace:
    """What Ray Serve adds to a server; of the other methods nobody is called."""
    return SimpleNamespace(**dict.fromkeys(SERVICE.methods_by_name) | methods)


async def caught(ask: Ask, fail: Fail) -> CallError:
    """How a call ends for the client that fails so at the proxy."""

    async def generate(request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:
        fail(context)
        return pb.GenerateResponse()

    async def generate_stream(
        request: pb.GenerateRequest, context: Any
    ) -> AsyncIterator[pb.GenerateChunk]:
        yield pb.GenerateChunk(text="a")
        fail(context)

    server = grpc.aio.server()
    add_memshare(servicer(Generate=generate, GenerateStream=generate_stream), server)  # type: ignore[arg-type]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with AsyncClient(f"127.0.0.1:{port}", retries=0) as client:
            with pytest.raises(CallError) as error:
                await ask(client)
            return error.value
    finally:
        await server.stop(None)


def status(code: grpc.StatusCode, details: str, **trailing: str) -> Fail:
    def fail(context: Any) -> None:
        context.set_code(code)
        context.set_details(details)
        pairs = [(name.replace("_", "-"), value) for name, value in trailing.items()]
        context.set_trailing_metadata(pairs)

    return fail


async def test_a_full_queue_says_when_to_come_again(ask: Ask) -> None:
    full = grpc.StatusCode.RESOURCE_EXHAUSTED
    error = await caught(ask, status(full, "full", request_id="r"))
    assert isinstance(error, OverloadedError)
    assert (error.details, error.retry_after_s) == ("full", 2.0)
    assert isinstance(error.__cause__, grpc.RpcError)
    trailing = dict(error.__cause__.trailing_metadata())  # type: ignore[attr-defined]
    assert trailing["request-id"] == "r"
    assert trailing["grpc-retry-pushback-ms"] == "2000"


async def test_a_limit_says_it_in_its_text(ask: Ask) -> None:
    full = grpc.StatusCode.RESOURCE_EXHAUSTED
    error = await caught(ask, status(full, str(LimitReachedError("tokens", 60, 41))))
    assert error.retry_after_s == 41.0


async def test_who_finds_no_replica_is_told_when_there_may_be_one(ask: Ask) -> None:
    error = await caught(ask, status(grpc.StatusCode.UNAVAILABLE, try_again(17)))
    assert isinstance(error, UnavailableError)
    assert error.retry_after_s == 17.0


async def test_a_dead_replica_is_unavailable_and_a_fault_of_ours_internal(ask: Ask) -> None:
    internal = grpc.StatusCode.INTERNAL
    dead = await caught(ask, status(internal, str(ActorDiedError())))
    assert isinstance(dead, UnavailableError)
    assert dead.details == "the replica has ended and is being replaced; try again"
    assert dead.retry_after_s == 1.0, "another replica takes it, or the router says when"
    assert isinstance(dead.__cause__, grpc.RpcError)
    trailing = dict(dead.__cause__.trailing_metadata())  # type: ignore[attr-defined]
    assert trailing["grpc-retry-pushback-ms"] == "1000"
    ours = await caught(ask, status(internal, "division by zero"))
    assert ours.code == internal
    assert ours.details == "division by zero"


async def test_rays_list_of_applications_is_closed_and_its_health_is_not() -> None:
    """On Ray Serve's own server, whose calls would go to replicas."""

    def serves(**_: object) -> Callable[[object, object], Awaitable[bytes]]:
        async def answer(request: object, context: object) -> bytes:
            return HealthzResponse(message="success").SerializeToString()

        return answer

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    added = ["cluster.grpc_ingress.add_memshare"]
    options = gRPCOptions(port=port, grpc_servicer_functions=added, enable_reflection=True)
    loop = asyncio.get_running_loop()
    ended, server = await start_grpc_server(serves, options, event_loop=loop)
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            ray = RayServeAPIServiceStub(channel)
            assert (await ray.Healthz(HealthzRequest())).message == "success"
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await ray.ListApplications(ListApplicationsRequest())
            assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED
            model = channel.unary_unary(f"/{SERVICE.full_name}/GetModelInfo")
            assert await model(b""), "ours go to replicas"
    finally:
        await server.stop(None)
        await ended


async def one_message() -> AsyncIterator[pb.GenerateRequest]:
    yield pb.GenerateRequest()


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
async def test_a_message_that_does_not_arrive_is_not_waited_for(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROXY_BODY_TIMEOUT_S", "0.3")
    server = grpc.aio.server()
    add_memshare(servicer(Generate=asyncio.sleep, GenerateStream=asyncio.sleep), server)  # type: ignore[arg-type]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        # For a client it is the same on the wire, and this one can begin a call without a message.
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            silent = channel.stream_stream(f"/{SERVICE.full_name}/{method}")()
            began = time.monotonic()
            with pytest.raises(grpc.aio.AioRpcError, match=r"did not arrive within 0\.3 s") as late:
                await silent.read()
            assert 0.2 < time.monotonic() - began < 60
            assert late.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            empty = channel.stream_stream(f"/{SERVICE.full_name}/{method}")()
            await empty.done_writing()
            with pytest.raises(grpc.aio.AioRpcError, match="has no message"):
                await empty.read()
    finally:
        await server.stop(None)


async def test_our_client_comes_again_when_it_is_told() -> None:
    """Its own first pause is half a second."""
    came: list[float] = []

    async def generate(request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:
        came.append(time.monotonic())
        if len(came) == 1:
            context.set_code(grpc.StatusCode.UNAVAILABLE)
            context.set_details(try_again(2))
        return pb.GenerateResponse(text="a")

    server = grpc.aio.server()
    add_memshare(servicer(Generate=generate), server)  # type: ignore[arg-type]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with AsyncClient(f"127.0.0.1:{port}") as client:
            assert (await client.generate("x")).text == "a"
    finally:
        await server.stop(None)
    first, second = came
    assert second - first > 1.9


class Handlers:
    """Takes what is added to a server."""

    def add_generic_rpc_handlers(self, handlers: tuple[Any]) -> None:
        [service] = handlers
        called = SimpleNamespace(method=f"/{SERVICE.full_name}/GenerateStream")
        self.generate_stream: Any = service.service(called).stream_stream


@pytest.mark.parametrize("rounds", [None, *range(6)])
async def test_a_client_that_leaves_while_a_message_is_written_ends_the_call(
    rounds: int | None,
) -> None:
    """gRPC cancels the call's task so many rounds of the loop after the write has failed."""
    events: list[str] = []

    async def read(request: Any, context: Any) -> AsyncGenerator[bytes, None]:
        """As Ray Serve: what ends the call to the replica is a cancelled wait, and no end of us."""
        yield b"a"
        try:
            await asyncio.wait([asyncio.ensure_future(asyncio.sleep(10))])
        except asyncio.CancelledError:
            events.append("replica cancelled")

    def cancel_in(rounds: int, task: asyncio.Task[None]) -> None:
        if rounds == 0:
            task.cancel()
        else:
            asyncio.get_running_loop().call_soon(cancel_in, rounds - 1, task)

    class Context:
        async def write(self, message: bytes) -> None:
            if rounds is not None:
                cancel_in(rounds, asyncio.current_task())  # type: ignore[arg-type]
            raise OSError("the client has left")

    handlers = Handlers()
    add_memshare(servicer(GenerateStream=read), handlers)  # type: ignore[arg-type]
    call = asyncio.ensure_future(handlers.generate_stream(one_message(), Context()))
    call.add_done_callback(lambda _: events.append("call ended"))
    await asyncio.wait([call])
    await asyncio.sleep(0)
    assert events == ["replica cancelled", "call ended"]
