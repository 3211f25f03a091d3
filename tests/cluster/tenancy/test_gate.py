"""Where Ray Serve listens, and limits over several replicas, which are limiters alone here."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema
from vllm.utils.network_utils import get_open_port

from cluster.app import _ledger, build
from cluster.processes.neighbours import BUILD
from cluster.tenancy.exposure import proxy_host
from cluster.tenancy.ledger import RayLedgerClient
from cluster.tenancy.limits import REPORT_S, Limiter, LimitReachedError, Limits
from memshare.config import ConfigError

pytestmark = pytest.mark.cluster

LIMITS = Limits(5, 6000)


@pytest.fixture(scope="module")
def running_serve(ray_address: str) -> Iterator[None]:
    """Ray Serve with an HTTP proxy that others can reach."""
    del ray_address
    options = {"host": "0.0.0.0", "port": get_open_port()}
    serve.start(proxy_location="HeadOnly", http_options=options)
    yield
    serve.shutdown()


@pytest.fixture(scope="module")
def ledger(running_serve: None) -> RayLedgerClient:
    return RayLedgerClient(serve.run(_ledger(), name="limits", route_prefix=None))


@pytest.mark.usefixtures("running_serve")
def test_a_server_that_others_can_reach_needs_keys(tmp_path: Path) -> None:
    assert proxy_host() == "0.0.0.0"
    with pytest.raises(ConfigError, match=r"http_options\.host = '0\.0\.0\.0'") as caught:
        build({"model": "smollm2-135m"})
    assert "fix: set 'auth.file'" in str(caught.value)
    build({"model": "smollm2-135m", "auth": {"file": str(tmp_path / "keys.yaml")}})


@pytest.mark.usefixtures("running_serve")
def test_two_applications_of_a_file_must_not_share_evaluators(tmp_path: Path) -> None:
    """Ray Serve builds each by itself; both are refused, and nothing of them starts."""
    arguments = {
        "model": "smollm2-135m",
        "auth": {"file": str(tmp_path / "keys.yaml")},
        "memshare": {"evaluator": {"source": "ray", "namespace": "mine"}},
    }
    applications = [
        {"name": name, "route_prefix": f"/{name}", "import_path": BUILD, "args": arguments}
        for name in ("one", "two")
    ]
    client = _get_global_client()
    assert client is not None
    client.deploy_apps(ServeDeploySchema.model_validate({"applications": applications}))
    end = time.monotonic() + 120
    while True:
        found = {name: serve.status().applications.get(name) for name in ("one", "two")}
        if all(app is not None and app.status == "DEPLOY_FAILED" for app in found.values()):
            break
        assert time.monotonic() < end, found
        time.sleep(0.5)
    for app in found.values():
        assert app is not None
        assert "memshare.evaluator.namespace = 'mine': the applications one, two" in app.message
        assert "fix: give each a namespace of its own" in app.message
        assert app.deployments == {}
    serve.delete("one")
    serve.delete("two")


async def admits(limiter: Limiter) -> bool:
    try:
        await limiter.admit("acme", LIMITS)
    except LimitReachedError:
        return False
    return True


async def test_replicas_share_limits_and_survive_their_ledger(ledger: RayLedgerClient) -> None:
    replicas = [Limiter(ledger, f"replica-{i}") for i in range(3)]
    began = time.monotonic()
    admitted = await asyncio.gather(*(admits(replicas[i % 3]) for i in range(30)))
    print(f"\n30 requests judged in {1000 * (time.monotonic() - began):.0f} ms")
    assert sum(admitted) == LIMITS.requests
    assert all(limiter.desk_faults == 0 for limiter in replicas)
    running = [sum(admitted[i::3]) for i in range(3)]

    # What a request costs that has to ask: one call through Ray Serve.
    times = []
    for _ in range(20):
        began = time.monotonic()
        assert not await admits(replicas[0])
        times.append(time.monotonic() - began)
    print(f"asking the ledger: {1000 * sorted(times)[10]:.1f} ms (median)")

    (actor,) = [a for a in ray.util.list_named_actors(all_namespaces=True) if "Ledger" in a["name"]]
    ray.kill(ray.get_actor(actor["name"], actor["namespace"]))
    end = time.monotonic() + 60
    while True:  # while it is gone, replicas go on alone; then the new one learns what runs
        faults = sum(limiter.desk_faults for limiter in replicas)
        for limiter in replicas:
            await limiter.report()
        if faults and sum(limiter.desk_faults for limiter in replicas) == faults:
            break
        assert time.monotonic() < end
        await asyncio.sleep(REPORT_S / 4)
    assert not any([await admits(limiter) for limiter in replicas])
    for limiter, count in zip(replicas, running, strict=True):
        for _ in range(count):
            limiter.release("acme")
        await limiter.report()
    assert sum([await admits(replicas[i % 3]) for i in range(12)]) == LIMITS.requests
