"""Routing, scaling, back-pressure, draining and rolling updates on a real Ray Serve.

Replicas are stand-ins (``stand_in.py``): no engine runs here, all else is the product's.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import grpc
import httpx
import pytest
from ray import serve
from ray.serve.config import gRPCOptions
from ray.serve.generated import serve_pb2, serve_pb2_grpc
from vllm.utils.network_utils import get_open_port

from cluster.config import ClusterArgs
from tests.cluster.support.stand_in import stand_in

pytestmark = [pytest.mark.cluster, pytest.mark.complete]

WAIT_S = 60.0
CALM = {"used": 0.1, "running": 1, "waiting": 0, "slots": 8, "preemptions": 0}
FULL = {"used": 0.99, "running": 4, "waiting": 2, "slots": 8, "preemptions": 3}
QUICK = {"health_check_period_s": 1.0}


class Cluster:
    """A running Ray Serve."""

    def __init__(self, folder: Path) -> None:
        self.http, self.grpc, self.loads = get_open_port(), get_open_port(), folder / "loads.json"
        self.report(CALM)
        adder = "ray.serve.generated.serve_pb2_grpc.add_UserDefinedServiceServicer_to_server"
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": "127.0.0.1", "port": self.http},
            grpc_options=gRPCOptions(port=self.grpc, grpc_servicer_functions=[adder]),
        )

    def report(self, load: dict[str, float], replica: str = "all") -> None:
        """Say what a replica, or all others, are to report from now on."""
        loads = json.loads(self.loads.read_text()) if self.loads.exists() else {}
        draft = self.loads.with_suffix(".new")
        draft.write_text(json.dumps({**loads, replica: load}))
        draft.rename(self.loads)

    def run(self, name: str, version: str = "1", wait: bool = True, **args: object) -> None:
        cluster = ClusterArgs.model_validate({"model": "none", **args})
        app = stand_in(cluster, self.loads, version)
        if wait:
            serve.run(app, name=name, route_prefix=f"/{name}")
        else:
            serve._run(app, name=name, route_prefix=f"/{name}", _blocking=False)

    def url(self, name: str, path: str) -> str:
        return f"http://127.0.0.1:{self.http}/{name}/{path}"

    def who(self, name: str, session: str = "", timeout_s: float = WAIT_S) -> dict[str, str]:
        headers = {"x-session-id": session} if session else {}
        answer = httpx.get(self.url(name, "who"), headers=headers, timeout=timeout_s)
        answer.raise_for_status()
        found: dict[str, str] = answer.json()
        return found

    def call(self, name: str, seconds: int = 0, session: str = "") -> str:
        """Over gRPC."""
        metadata = [("application", name)] + ([("session_id", session)] if session else [])
        with grpc.insecure_channel(f"127.0.0.1:{self.grpc}") as channel:
            stub = serve_pb2_grpc.UserDefinedServiceStub(channel)
            message = serve_pb2.UserDefinedMessage(name="x", num=seconds, foo="y")
            answer: str = stub.Method1(message, metadata=metadata, timeout=WAIT_S).greeting
            return answer

    def running(self, name: str) -> int:
        (deployment,) = serve.status().applications[name].deployments.values()
        return deployment.replica_states.get("RUNNING", 0)


@pytest.fixture(scope="module")
def cluster(ray_address: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    yield Cluster(tmp_path_factory.mktemp("scaling"))
    serve.shutdown()


def until(happened: Callable[[], bool], what: str) -> float:
    """Wait; returns how long it took, in seconds."""
    began = time.monotonic()
    while not happened():
        assert time.monotonic() - began < WAIT_S, what
        time.sleep(0.2)
    return time.monotonic() - began


def read(url: str, seconds: float) -> list[str]:
    """All lines of a stream."""
    with httpx.stream("GET", url, params={"seconds": seconds}, timeout=WAIT_S) as answer:
        assert answer.status_code == 200
        return list(answer.iter_lines())


def start_streams(
    pool: ThreadPoolExecutor, url: str, seconds: float, count: int
) -> list[Future[list[str]]]:
    return [pool.submit(read, url, seconds) for _ in range(count)]


def test_sessions_have_a_home_on_http_and_grpc_until_it_is_out_of_memory(cluster: Cluster) -> None:
    cluster.report(CALM)
    cluster.run("routes", replicas=3, routing={"report_period_s": 0.5})
    until(lambda: len({cluster.who("routes")["replica"] for _ in range(12)}) == 3, "not all serve")
    homes = {cluster.who("routes", "a session")["replica"] for _ in range(10)}
    assert len(homes) == 1
    (home,) = homes
    assert {cluster.call("routes", session="a session") for _ in range(5)} == homes
    assert len({cluster.who("routes", f"session {i}")["replica"] for i in range(20)}) == 3

    def its_replica() -> str:
        return cluster.who("routes", "a session")["replica"]

    cluster.report(FULL, home)
    until(lambda: its_replica() != home, "the session stays where there is no memory")
    others = Counter(cluster.who("routes")["replica"] for _ in range(30))
    assert others[home] < 5, "pairs of two have one with memory, whichever they are"
    cluster.report(CALM, home)
    until(lambda: its_replica() == home, "the session does not come back")
    serve.delete("routes")


def test_one_to_two_to_one_replicas_by_kv_pressure_and_streams_finish(cluster: Cluster) -> None:
    cluster.report(CALM)
    scaling = {
        "min_replicas": 1, "max_replicas": 2, "up_delay_s": 0.5, "down_delay_s": 0.5,
        "look_back_s": 3.0, "report_period_s": 0.5,
    }  # fmt: skip
    cluster.run("scales", scaling=scaling, routing={"sessions": False}, replica=QUICK)
    assert cluster.running("scales") == 1
    cluster.report(FULL)
    up_s = until(lambda: cluster.running("scales") == 2, "no second replica under pressure")
    url = cluster.url("scales", "stream")
    with ThreadPoolExecutor(12) as pool:
        streams = start_streams(pool, url, seconds=40.0, count=12)
        time.sleep(1.0)
        cluster.report(CALM)
        down_s = until(lambda: cluster.running("scales") == 1, "the second replica stays")
        assert not any(stream.done() for stream in streams), "they have to run while it stops"
        answers = [stream.result() for stream in streams]
    print(f"\nup after {up_s:.1f} s, down after {down_s:.1f} s")
    assert len({lines[0] for lines in answers}) == 2, "streams ran on both"
    assert all(lines[-1] == "end" for lines in answers)
    serve.delete("scales")


def test_too_many_requests_are_told_when_to_come_back(cluster: Cluster) -> None:
    limits = {"max_ongoing_requests": 1, "max_queued_requests": 1, "retry_after_s": 7.0}
    cluster.run("limits", replica=limits)
    url = cluster.url("limits", "stream")
    with ThreadPoolExecutor(2) as pool:
        streams = []
        for _ in range(2):  # one runs, one waits
            streams += start_streams(pool, url, seconds=10.0, count=1)
            time.sleep(0.7)
        refused = httpx.get(url, params={"seconds": 0}, timeout=WAIT_S)
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "7"
        with pytest.raises(grpc.RpcError) as caught:
            cluster.call("limits")
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert all(stream.result()[-1] == "end" for stream in streams)
    assert cluster.call("limits"), "there is room again"
    serve.delete("limits")


@pytest.mark.parametrize("surge", [100, 0])
def test_a_rolling_update_fails_no_request(cluster: Cluster, surge: int) -> None:
    name = f"rolls{surge}"
    replica = {**QUICK, "max_surge_percent": surge}
    cluster.run(name, version="old", replica=replica)
    url = cluster.url(name, "stream")
    versions: list[str] = []
    slowest_s = 0.0
    done = threading.Event()

    def ask() -> None:
        nonlocal slowest_s
        while not done.is_set():
            began = time.monotonic()
            versions.append(cluster.who(name)["version"])
            slowest_s = max(slowest_s, time.monotonic() - began)

    with ThreadPoolExecutor(3) as pool:
        asking = pool.submit(ask)
        streams = start_streams(pool, url, seconds=6.0, count=2)
        time.sleep(1.0)
        cluster.run(name, version="new", wait=False, replica=replica)
        try:
            until(lambda: asking.done() or versions[-1:] == ["new"], "no update")
        finally:
            done.set()
        asking.result()
        assert [stream.result()[-1] for stream in streams] == ["end", "end"]
    print(f"\nsurge {surge}: {len(versions)} requests, the slowest took {slowest_s:.1f} s")
    first_new = versions.index("new")
    assert first_new > 0
    assert set(versions[:first_new]) == {"old"}
    serve.delete(name)
