"""How large a message between Ray Serve's proxies and replicas may be."""

from __future__ import annotations

import logging

import pytest
import yaml
from ray.serve._private import constants
from ray.serve._private.common import DeploymentHandleSource, DeploymentID

from cluster.app import build
from cluster.config import RoutingConfig
from cluster.grpc.hop import MAX_MESSAGE_BYTES
from cluster.routing.router import KVRouter
from tools.kubernetes.layout import K8S
from tools.runtime_env import DEFAULTS

VARIABLE = "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH"
CLIENTS = "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE"


def test_replicas_take_requests_of_every_size_however_ray_was_started() -> None:
    def environment(**replica: object) -> dict[str, str]:
        app = build({"model": "m", "replica": replica})
        actor = app._bound_deployment.ray_actor_options
        assert actor is not None
        found: dict[str, str] = actor["runtime_env"]["env_vars"]
        return found

    assert environment() == {VARIABLE: str(MAX_MESSAGE_BYTES)}
    own = {"OMP_NUM_THREADS": "1", VARIABLE: "5000000"}
    assert environment(env=own) == own


def test_ray_is_started_with_it_here_and_on_kubernetes() -> None:
    assert DEFAULTS[VARIABLE] == DEFAULTS[CLIENTS] == str(MAX_MESSAGE_BYTES)
    text = (K8S / "base" / "rayservice.yaml").read_text()
    config = yaml.safe_load(text)["spec"]["rayClusterConfig"]
    groups = [config["headGroupSpec"], *config["workerGroupSpecs"]]
    pods = [group["template"]["spec"]["containers"][0] for group in groups]
    served = [{e["name"]: e.get("value") for e in pod["env"]} for pod in pods]
    with_grpc = [env for env in served if "RAY_SERVE_PROXY_USE_GRPC" in env]
    assert len(with_grpc) >= 2, "the head and the engines have proxies"
    assert all(env[VARIABLE] == env[CLIENTS] == str(MAX_MESSAGE_BYTES) for env in with_grpc)


@pytest.mark.parametrize(("by_grpc", "limit", "warns"), [(1, 4, 1), (1, 72, 0), (0, 4, 0)])
async def test_a_proxy_that_takes_no_large_replies_says_so_at_its_start(
    by_grpc: int,
    limit: int,
    warns: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(constants, "RAY_SERVE_PROXY_USE_GRPC", bool(by_grpc))
    monkeypatch.setattr(constants, VARIABLE, limit * 2**20)
    caplog.set_level(logging.WARNING, "ray.serve")
    router = KVRouter(
        deployment_id=DeploymentID(name="Engine", app_name="memshare"),
        handle_source=DeploymentHandleSource.PROXY,
    )
    router.initialize_state(**RoutingConfig().model_dump(), unavailable_s=17)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == warns
    assert all(f"set {VARIABLE}={MAX_MESSAGE_BYTES} where Ray starts" in line for line in said)
