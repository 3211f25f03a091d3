"""A node that is drained: its replicas move away, and what they were doing is finished."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import serve

from cluster.processes.drain import drain, replicas_on

pytestmark = [pytest.mark.cluster, pytest.mark.complete]


@serve.deployment(
    num_replicas=4,
    ray_actor_options={"num_cpus": 0.1},
    max_ongoing_requests=8,
    graceful_shutdown_timeout_s=30,
    graceful_shutdown_wait_loop_s=0.2,
)
class Slow:
    """Answers with its node, some seconds after a folder has a file named ``gate``.

    A request that is under way is a file there, too: a replica that is full answers no question.
    """

    async def __call__(self, folder: str, seconds: float) -> str:
        import asyncio
        import uuid

        Path(folder, f"running-{uuid.uuid4()}").touch()
        while not Path(folder, "gate").exists():
            await asyncio.sleep(0.1)
        await asyncio.sleep(seconds)
        return str(ray.get_runtime_context().get_node_id())


@pytest.fixture
def second_node(ray_address: str) -> Iterator[str]:
    """Id of a node that joins the cluster."""
    before = {node["NodeID"] for node in ray.nodes()}
    process = subprocess.Popen(
        ["ray", "start", "--address", ray_address, "--num-cpus", "2", "--block"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
    )
    try:
        end = time.monotonic() + 60
        while not (new := {n["NodeID"] for n in ray.nodes() if n["Alive"]} - before):
            assert time.monotonic() < end, "the node does not join"
            time.sleep(0.2)
        yield new.pop()
    finally:
        process.terminate()
        process.wait(timeout=60)


@pytest.fixture
def slow(second_node: str) -> Iterator[Any]:
    serve.start(proxy_location="Disabled")
    try:
        yield serve.run(Slow.bind(), name="slow", route_prefix=None)  # type: ignore[attr-defined]
    finally:
        serve.shutdown()


def test_replicas_leave_and_finish_first(second_node: str, slow: Any, tmp_path: Path) -> None:
    assert replicas_on(second_node) > 0, "replicas spread over both nodes"
    running = [slow.remote(str(tmp_path), 5.0) for _ in range(16)]
    end = time.monotonic() + 120
    while len(list(tmp_path.glob("running-*"))) < 16:
        assert time.monotonic() < end, "they do not get under way"
        time.sleep(0.1)
    (tmp_path / "gate").touch()
    assert drain(second_node, deadline_s=60)
    assert replicas_on(second_node) == 0
    nodes = [answer.result(timeout_s=60) for answer in running]
    assert second_node in nodes, "some ran there, and none was cut"
    assert {slow.remote(str(tmp_path), 0.0).result(timeout_s=60) for _ in range(8)} == set(
        nodes
    ) - {second_node}


def test_a_deadline_ends_the_wait(second_node: str) -> None:
    began = time.monotonic()
    assert not drain(second_node, deadline_s=1.0, replicas=lambda node_id: 1)
    assert time.monotonic() - began < 60


@pytest.mark.usefixtures("ray_address")
def test_a_node_that_is_not_there_can_be_left() -> None:
    """Ray has nothing to drain: a pod whose node is gone already is not held up."""
    assert drain("0" * 56, deadline_s=1.0)
