"""Our router and our policy as Ray Serve uses them: its own classes, no running Ray."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.autoscaling_state import _resolve_policy_callable
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID
from ray.serve._private.config import DeploymentConfig
from ray.serve.autoscaling_policy import _apply_autoscaling_config
from ray.serve.config import AutoscalingConfig, AutoscalingContext
from ray.serve.request_router import PendingRequest

from cluster.app import serving
from cluster.config import ClusterArgs, RoutingConfig, ScalingConfig
from cluster.routing.autoscaler import autoscaling_config
from cluster.routing.load import Load, to_stats
from cluster.routing.router import router_config

DEPLOYMENT = DeploymentID(name="Engine", app_name="memshare")
FULL = Load(0.99, running=4, waiting=4, slots=64, preemptions=0)
CALM = Load(0.3, running=4, waiting=0, slots=64, preemptions=0)


class Replica:
    """What a router sees of a running replica."""

    max_ongoing_requests = 8

    def __init__(self, name: str) -> None:
        self.replica_id = ReplicaID(name, DEPLOYMENT)
        self.routing_stats: dict[str, float] = {}
        self.multiplexed_model_ids: set[str] = set()
        self.queue = 0
        self.delay_s = 0.0

    async def get_queue_len(self, *, deadline_s: float) -> int:
        await asyncio.sleep(self.delay_s)
        return self.queue


def request(session: str = "", kind: str = "") -> PendingRequest:
    metadata = SimpleNamespace(
        session_id=session, internal_request_id="1", multiplexed_model_id=kind
    )
    return PendingRequest(args=[], kwargs={}, metadata=metadata)  # type: ignore[arg-type]


def router(routing: RoutingConfig) -> Any:
    """As Ray Serve makes it in a proxy: from bytes."""
    config = router_config(routing, unavailable_s=17)
    made = pickle.loads(config.get_serialized_request_router_cls() or b"")(
        deployment_id=DEPLOYMENT,
        handle_source=DeploymentHandleSource.UNKNOWN,
        use_replica_queue_len_cache=True,
    )
    made.initialize_state(**config.request_router_kwargs)
    return made


async def first(made: Any, session: str = "", kind: str = "") -> str:
    ranks = await made.choose_replicas(made._replicas_list, request(session, kind))
    name: str = ranks[0][0].replica_id.unique_id
    return name


async def test_a_router_follows_sessions_reports_and_deaths() -> None:
    made = router(RoutingConfig())
    replicas = [Replica(name) for name in "abcd"]
    made.update_replicas(replicas)
    await asyncio.sleep(0.01)  # it asks new replicas for their queues
    home = await first(made, "a session")
    assert {await first(made, "a session") for _ in range(9)} == {home}
    assert len({await first(made) for _ in range(60)}) == 4
    for replica in replicas:
        is_home = replica.replica_id.unique_id == home
        replica.routing_stats = to_stats(FULL if is_home else CALM)
        replica.queue = 8 if is_home else 4
        made.on_new_queue_len_info(replica.replica_id, replica.queue)
    made.update_replicas(replicas)
    second = await first(made, "a session")
    assert second != home
    assert home not in {await first(made) for _ in range(60)}
    made.on_replica_actor_died(ReplicaID(second, DEPLOYMENT))
    assert await first(made, "a session") not in (home, second)
    made.update_replicas([])
    assert await made.choose_replicas([], request("a session")) == []


@pytest.mark.parametrize("kinds", [False, True])
async def test_a_router_reads_the_kind_of_a_request(kinds: bool) -> None:
    made = router(RoutingConfig(sessions=False, kinds=kinds))
    made.update_replicas([Replica(name) for name in "abcd"])
    await asyncio.sleep(0.01)
    for _ in range(150):
        for kind in ("code", "prose"):
            await first(made, kind=kind)
    found = [{await first(made, kind=kind) for _ in range(40)} for kind in ("code", "prose")]
    assert [len(names) for names in found] == ([2, 2] if kinds else [4, 4])
    assert found[0].isdisjoint(found[1]) is kinds


@pytest.mark.parametrize(("delay_s", "waits"), [(0.3, True), (60.0, False)])
async def test_a_session_waits_for_a_home_that_is_slow_to_answer(
    delay_s: float, waits: bool
) -> None:
    """Not for one that hangs."""
    made = router(RoutingConfig())
    replicas = [Replica(name) for name in "abcd"]
    made.update_replicas(replicas)
    home = await first(made, "a session")
    for replica in replicas:
        replica.delay_s = delay_s if replica.replica_id.unique_id == home else 0.0
    chosen = await made._choose_replica_for_request(request("a session"))
    assert (chosen.replica_id.unique_id == home) is waits


def test_rays_own_router_where_ours_would_do_the_same() -> None:
    plain = RoutingConfig(sessions=False, load="requests")
    assert router_config(plain, 17).is_default_request_router()
    for other in ({"load": "kv"}, {"sessions": True}, {"kinds": True}):
        config = router_config(plain.model_copy(update=other), 17)
        assert not config.is_default_request_router()


def context(config: AutoscalingConfig, now: Load, replicas: int) -> AutoscalingContext:
    ids = [ReplicaID(str(i), DEPLOYMENT) for i in range(replicas)]
    stats = to_stats(now)
    return AutoscalingContext(
        deployment_id=DEPLOYMENT,
        deployment_name="Engine",
        app_name="memshare",
        current_num_replicas=replicas,
        target_num_replicas=replicas,
        running_replicas=ids,
        total_num_requests=0,
        total_queued_requests=0,
        aggregated_metrics={name: dict.fromkeys(ids, value) for name, value in stats.items()},
        raw_metrics=None,
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=9,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=0.0,
        config=config,
    )


def policy(config: AutoscalingConfig) -> Callable[[AutoscalingContext], tuple[int, dict[str, Any]]]:
    """As Ray Serve's controller makes it: from bytes, with Ray Serve's delays around it."""
    sent = AutoscalingConfig.model_validate(config.model_dump(exclude={"policy"}))
    sent.policy = pickle.loads(pickle.dumps(config.policy))
    return _apply_autoscaling_config(_resolve_policy_callable(sent.policy))


@pytest.mark.parametrize(("now", "replicas", "wanted"), [(FULL, 2, 4), (CALM, 4, 2), (CALM, 1, 1)])
def test_the_policy_answers_what_was_decided(now: Load, replicas: int, wanted: int) -> None:
    scaling = ScalingConfig(min_replicas=1, max_replicas=9, up_delay_s=0.0, down_delay_s=0.0)
    config = autoscaling_config(scaling, replicas=1)
    assert policy(config)(context(config, now, replicas))[0] == wanted


def test_the_policy_waits_as_long_as_it_is_told() -> None:
    scaling = ScalingConfig(max_replicas=9)
    config = autoscaling_config(scaling, replicas=1)
    number, state = policy(config)(context(config, FULL, 2))
    assert number == 2
    assert state, "Ray Serve notes since when more are wanted"


@pytest.mark.parametrize("scaling", [None, {"max_replicas": 5}])
def test_a_deployment_survives_the_way_to_the_controller(scaling: dict[str, int] | None) -> None:
    cluster = ClusterArgs.model_validate(
        {
            "model": "m",
            "replicas": 3,
            "scaling": scaling,
            "replica": {"max_queued_requests": 7, "retry_after_s": 3, "max_surge_percent": 50},
        }
    )
    sent = serving(cluster, "Engine")(Replica)._deployment_config
    got = DeploymentConfig.from_proto_bytes(sent.to_proto_bytes())
    assert got.max_queued_requests == 7
    assert (got.backpressure_config.status_code, got.backpressure_config.retry_after_s) == (429, 3)
    assert got.max_surge_percent == 50
    assert got.graceful_shutdown_timeout_s == 300
    assert got.request_router_config.request_routing_stats_period_s == 2
    assert got.request_router_config.request_router_kwargs["fallbacks"] == 2
    if scaling is None:
        assert (got.num_replicas, got.autoscaling_config) == (3, None)
    else:
        assert got.autoscaling_config is not None
        assert got.autoscaling_config.initial_replicas == 3
        assert got.autoscaling_config.policy.policy_kwargs["max_replicas"] == 5
