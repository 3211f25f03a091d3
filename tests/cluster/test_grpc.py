"""gRPC through Ray Serve's own proxy to two replicas. Only the engines are stand-ins.

What needs a real engine is in test_serve.py.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import grpc
import psutil
import pytest
from ray import serve

from memshare.client import (
    Client,
    FinishReason,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    Sampling,
    TimedOutError,
    UnavailableError,
)
from tests.cluster.support.grpc_replica import Replica
from tools.bench.local_cluster import free_port, processes

pytestmark = pytest.mark.cluster

ENDLESS = Sampling(ignore_eos=True)


@pytest.fixture(scope="module")
def address(ray_address: str) -> Iterator[str]:
    port = free_port()
    services = ["cluster.grpc_ingress.add_memshare", "cluster.grpc_ingress.add_health"]
    serve.start(
        http_options={"host": "127.0.0.1", "port": free_port()},
        grpc_options={"port": port, "grpc_servicer_functions": services},
    )
    deployment = serve.deployment(
        Replica,
        num_replicas=2,
        max_ongoing_requests=16,
        max_queued_requests=16,
        health_check_period_s=1,
        ray_actor_options={"num_cpus": 0},
    )
    serve.run(deployment.bind(), name="grpc")
    yield f"127.0.0.1:{port}"
    serve.shutdown()


def running_by_replica() -> dict[int, list[str]]:
    """The requests of each replica: process id to the engine's ids."""
    handle = serve.get_deployment_handle("Replica", "grpc")
    return dict(handle.broadcast("running").results(timeout_s=30))


def running() -> int:
    return sum(map(len, running_by_replica().values()))


def wait_until_idle() -> None:
    end = time.monotonic() + 20
    while running() > 0:
        assert time.monotonic() < end, "a request runs on for nobody"
        time.sleep(0.05)


def test_abort_finds_a_request_on_any_replica(address: str) -> None:
    with Client(address) as client:
        streams = [iter(client.generate_stream("x", ENDLESS, request_id=f"r{i}")) for i in range(8)]
        for stream in streams:
            next(stream)
        assert running() == 8
        assert not client.abort("nobody")
        assert all(client.abort(f"r{i}") for i in range(8))
        for stream in streams:
            *_, last = stream
            assert last.finish.reason == FinishReason.FINISH_REASON_ABORT
    wait_until_idle()


def test_who_leaves_or_is_late_frees_the_replica(address: str) -> None:
    with Client(address) as client:
        with client.chat_stream([("user", "x")], ENDLESS) as stream:
            replies = iter(stream)  # held: a stream that nobody holds is cancelled
            next(replies)
            assert running() == 1
        wait_until_idle()
        with pytest.raises(TimedOutError):
            client.generate("x", ENDLESS, timeout=0.5)
        wait_until_idle()


def test_whenever_a_stream_is_left_the_replica_is_freed(address: str) -> None:
    """Also while the proxy writes a message, when Ray Serve by itself forgets the replica."""
    with Client(address) as client:
        for round_ in range(60):
            streams = [client.chat_stream([("user", "x")], ENDLESS) for _ in range(4)]
            for number, stream in enumerate(streams):
                for _ in zip(range(1 + (7 * round_ + number) % 13), stream, strict=False):
                    pass
            for stream in streams:
                stream.cancel()
    wait_until_idle()


async def test_a_refusal_reaches_the_caller_as_it_was_said(address: str) -> None:
    def refused() -> str:
        with Client(address) as client, pytest.raises(NotFoundError) as caught:
            client.generate("x", model="y")
        return caught.value.details

    assert await asyncio.to_thread(refused) == "model: there is no 'y'"
    async with grpc.aio.insecure_channel(address) as channel:
        for method in ("Generate", "Abort", "GetStats"):
            with pytest.raises(grpc.aio.AioRpcError) as broken:
                await channel.unary_unary(f"/memshare.v1.MemShare/{method}")(b"\xff\xff\xff")
            assert broken.value.code() == grpc.StatusCode.INVALID_ARGUMENT


MIB = 2**20


@pytest.mark.parametrize("mib", [5, 15, 17, 63, 65])
def test_every_size_is_answered_or_refused_by_its_name(address: str, mib: int) -> None:
    """Also beyond the 4 MiB that gRPC has between proxy and replica unless it is told otherwise."""
    with Client(address) as client:
        if mib <= 16:
            assert client.generate("x" * (mib * MIB)).text
            return
        limit = 16 * MIB if mib <= 64 else 64 * MIB
        with pytest.raises(InvalidRequestError, match=f"more than {limit}; send a shorter prompt"):
            client.generate("x" * (mib * MIB))


def test_a_reply_of_any_size_comes_back(address: str) -> None:
    with Client(address) as client:
        assert len(client.generate(f"say {6 * MIB}").text) == 6 * MIB


def test_both_replicas_answer(address: str) -> None:
    with Client(address) as client:
        seen = set()
        for _ in range(50):
            seen.add(client.stats().replica_id)
        assert len(seen) == 2


@pytest.mark.complete
def test_who_comes_to_a_full_queue_is_told_when_to_come_again(address: str) -> None:
    with Client(address) as client, ThreadPoolExecutor(92) as pool:

        def ask(count: int) -> list[Future[object]]:
            return [pool.submit(client.generate, "x", ENDLESS, timeout=15) for _ in range(count)]

        calls = []
        while (now := running()) < 28:  # a few at once: who is on the way counts as waiting, too
            calls += ask(min(4, 28 - now))
            time.sleep(0.2)
        calls += ask(64)  # from here on counting would wait for a place, too
        errors = [call.exception() for call in calls]
    refused = [error for error in errors if isinstance(error, OverloadedError)]
    assert refused
    assert {error.retry_after_s for error in refused} == {2.0}
    others = [error for error in errors if error not in refused]
    assert len(others) >= 32
    assert all(isinstance(error, TimedOutError) for error in others)
    wait_until_idle()


def breaks_off(stream: Iterator[object], within_s: float = 3) -> bool:
    """Whether a stream says soon that it may be tried again; first comes what was under way."""
    end = time.monotonic() + within_s
    try:
        while time.monotonic() < end:
            next(stream)
    except UnavailableError:
        return True
    return False


def streams_on_both(client: Client, count: int = 8) -> dict[str, Iterator[object]]:
    """By request id. While a router's news of one replica is old, the other gets all streams."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        streams = {
            f"s{i}": client.generate_stream("x", ENDLESS, request_id=f"s{i}") for i in range(count)
        }
        replies = {request_id: iter(stream) for request_id, stream in streams.items()}
        for reply in replies.values():
            next(reply)
        if all(running_by_replica().values()):
            return replies
        for stream in streams.values():
            stream.cancel()
        wait_until_idle()
        time.sleep(1)
    raise AssertionError("one replica gets all requests, and goes on to")


@pytest.mark.complete
def test_a_killed_replica_ends_its_own_streams_and_no_other(address: str) -> None:
    with Client(address) as client:
        streams = streams_on_both(client)
        placed = running_by_replica()
        dead, alive = placed
        own = {engine_id.split("-")[1] for engine_id in placed[dead]}
        psutil.Process(dead).kill()
        assert {at for at, stream in streams.items() if breaks_off(stream)} == own
        assert len(running_by_replica()[alive]) == len(streams) - len(own)
        assert all(client.abort(at) for at in streams if at not in own)
    end = time.monotonic() + 60
    while len(processes("ray::ServeReplica:grpc")) < 2:
        assert time.monotonic() < end
        time.sleep(0.1)
    wait_until_idle()
