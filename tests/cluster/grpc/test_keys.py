"""Keys on gRPC (cluster/grpc/keys.py), over real channels; the method behind them is a stand-in."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import grpc
import pytest
from ray.serve.grpc_util import RayServegRPCContext

from cluster.grpc.keys import CODES, host_of, identify
from cluster.tenancy.call import RefusedError
from cluster.tenancy.gate import Gate
from tests.cluster.support.gates import gate_for, open_gate

METHOD = "/test.Test/Call"


class Signal(asyncio.Event):
    """Counts who has come to wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting = 0

    async def wait(self) -> Literal[True]:
        self.waiting += 1
        return await super().wait()


@asynccontextmanager
async def served(gate: Gate, host: str = "127.0.0.1") -> AsyncIterator[tuple[str, Signal]]:
    """A server whose method waits for the event, and its address."""
    go_on = Signal()

    async def method(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        serve_context = RayServegRPCContext(context)  # as Ray Serve's proxy makes it
        try:
            async with gate.admit(identify(gate, serve_context)) as call:
                if request == b"wait":
                    await go_on.wait()
                return f"{call.caller.tenant} {gate.call() is call}".encode()
        except RefusedError as refusal:
            await context.abort(
                CODES[refusal.kind], str(refusal), tuple(serve_context.trailing_metadata())
            )
            raise AssertionError("abort raises") from None

    handler = grpc.method_handlers_generic_handler(
        "test.Test", {"Call": grpc.unary_unary_rpc_method_handler(method)}
    )
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("0.0.0.0:0")
    await server.start()
    try:
        yield f"{host}:{port}", go_on
    finally:
        await server.stop(0)


async def ask(address: str, request: bytes = b"", **metadata: str) -> str:
    pairs = tuple((name.replace("_", "-"), value) for name, value in metadata.items())
    async with grpc.aio.insecure_channel(address) as channel:
        answer: bytes = await channel.unary_unary(METHOD)(request, metadata=pairs, timeout=10)
        return answer.decode()


@pytest.mark.parametrize("metadata", [{"authorization": "Bearer acme"}, {"x_api_key": "acme"}])
async def test_a_key_opens(tmp_path: Path, metadata: dict[str, str]) -> None:
    async with served(gate_for(tmp_path, acme={})) as (address, _):
        assert await ask(address, **metadata) == "acme True"


@pytest.mark.parametrize("metadata", [{}, {"authorization": "Bearer wrong"}])
async def test_no_key_and_a_wrong_key_are_unauthenticated(
    tmp_path: Path, metadata: dict[str, str]
) -> None:
    async with served(gate_for(tmp_path, acme={})) as (address, _):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(address, **metadata)
    assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED


async def test_a_limit_says_when_to_come_again(tmp_path: Path) -> None:
    gate = gate_for(tmp_path, acme={"concurrent_requests": 1})
    key = {"authorization": "Bearer acme"}
    async with served(gate) as (address, go_on):
        first = asyncio.create_task(ask(address, b"wait", **key))
        while not gate._calls:
            await asyncio.sleep(0.01)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(address, **key)
        go_on.set()
        assert await first == "acme True"
        assert await ask(address, **key) == "acme True"
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "try again in 1 s" in (caught.value.details() or "")


async def test_without_keys_this_machine_is_served() -> None:
    async with served(open_gate()) as (address, _):
        assert await ask(address) == "local True"


def own_address() -> str | None:
    """An address of this machine that others could use; no packet is sent to find it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return None
        return str(probe.getsockname()[0])


@pytest.mark.skipif(own_address() is None, reason="the machine has a loopback interface only")
async def test_without_keys_nobody_else_is_served() -> None:
    async with served(open_gate(), str(own_address())) as (address, _):
        with pytest.raises(grpc.aio.AioRpcError, match="set 'auth'") as caught:
            await ask(address)
    assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize(
    ("peer", "host"),
    [
        ("ipv4:127.0.0.1:5000", "127.0.0.1"),
        ("ipv6:%5B::1%5D:5000", "[::1]"),
        ("ipv6:[::1]:5000", "[::1]"),
        ("unix:/tmp/socket", None),
        ("", None),
        (None, None),
    ],
)
def test_the_address_of_a_peer(peer: str | None, host: str | None) -> None:
    assert host_of(peer) == host


async def test_without_keys_a_connection_has_bounds_and_another_one_its_own() -> None:
    async with served(open_gate(requests_per_connection=3)) as (address, go_on):
        # Channels of one process share a connection, unless they are told not to.
        own = [("grpc.use_local_subchannel_pool", 1)]
        async with (
            grpc.aio.insecure_channel(address, own) as greedy,
            grpc.aio.insecure_channel(address, own) as other,
        ):
            waiting = [
                asyncio.ensure_future(greedy.unary_unary(METHOD)(b"wait", timeout=120))
                for _ in range(3)
            ]
            while go_on.waiting < 3:
                await asyncio.sleep(0.01)
            with pytest.raises(grpc.aio.AioRpcError, match="limit of 3 requests") as limited:
                await greedy.unary_unary(METHOD)(b"", timeout=60)
            assert limited.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert await other.unary_unary(METHOD)(b"", timeout=60) == b"local True"
            go_on.set()
            assert await asyncio.gather(*waiting) == [b"local True"] * 3
            assert await greedy.unary_unary(METHOD)(b"", timeout=60) == b"local True"
