"""The Ray Serve application, named ``cluster.app:build`` in config files."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping

from ray import serve
from ray.serve import Application
from ray.serve.config import BackpressureConfig

from cluster.config import ClusterArgs, PageConfig, parse_cluster_args, without_secrets
from cluster.dashboard.hub import DashboardHub
from cluster.evaluator_pool import EvaluatorPool
from cluster.grpc.hop import replica_environment
from cluster.http.timeouts import timeouts
from cluster.processes.neighbours import require_own_namespace_in_cluster
from cluster.replica import EngineReplica
from cluster.routing.autoscaler import autoscaling_config
from cluster.routing.router import router_config
from cluster.tenancy.exposure import require_keys_or_localhost
from cluster.tenancy.ledger import LimitLedger

logger = logging.getLogger(__name__)

_HEALTH_PERIOD_S = 2.0  # how long an evaluator, or the page's board, may be missing


def build(args: Mapping[str, object]) -> Application:
    """Build the application; everything is checked first, and nothing is started.

    Args:
        args: see :class:`cluster.config.ClusterArgs`.

    Raises:
        ConfigError: names each wrong field, its value and the fix.
    """
    cluster = parse_cluster_args(args)
    if cluster.engine.extra or cluster.memshare.agents.adapters:
        # Only here: it imports vLLM, which takes many seconds.
        from cluster.engine.options import check_engine_options

        check_engine_options(cluster)
    timeouts(os.environ)  # proxies read them, too, where nobody would look for what is wrong
    require_keys_or_localhost(cluster.auth)
    require_own_namespace_in_cluster(cluster)
    logger.info("MemShare cluster: %s", without_secrets(cluster).model_dump_json())
    pool = _pool(cluster) if cluster.uses_pool else None
    ledger = _ledger() if cluster.uses_ledger else None
    board = _board(cluster.page) if cluster.page.enabled else None
    return _engine(cluster).bind(cluster, pool, ledger, board)


def serving(cluster: ClusterArgs, name: str) -> Callable[[type], serve.Deployment]:
    """What makes a class a deployment that is routed to, scaled, limited and drained as configured.

    Args:
        cluster: the application's arguments.
        name: of the deployment.
    """
    replica, scaling = cluster.replica, cluster.scaling
    limit = replica.max_queued_requests
    return serve.deployment(
        name=name,
        num_replicas=None if scaling else cluster.replicas,
        autoscaling_config=autoscaling_config(scaling, cluster.replicas) if scaling else None,
        request_router_config=router_config(cluster.routing, replica.unavailable_retry_after_s),
        max_ongoing_requests=replica.max_ongoing_requests,
        max_queued_requests=-1 if limit is None else limit,
        backpressure_config=BackpressureConfig(
            status_code=429, retry_after_s=replica.retry_after_s
        ),
        max_surge_percent=replica.max_surge_percent,
        health_check_period_s=replica.health_check_period_s,
        health_check_timeout_s=replica.health_check_timeout_s,
        graceful_shutdown_timeout_s=replica.graceful_shutdown_timeout_s,
    )


def _engine(cluster: ClusterArgs) -> serve.Deployment:
    replica = cluster.replica
    deploy = serving(cluster, "Engine")
    engine = deploy(serve.ingress()(EngineReplica))
    environment = replica_environment(replica.env)
    actor = {"num_cpus": replica.cpus, "runtime_env": {"env_vars": environment}}
    if cluster.engine.distributed_executor_backend != "ray":
        return engine.options(ray_actor_options={**actor, "num_gpus": replica.gpus})
    # Workers are Ray actors of their own: on the replica's node, or on as few nodes as hold them.
    # The first shares the replica's bundle, so that the replica is never on a node without one.
    others = [{"GPU": 1.0} for _ in range(cluster.engine.tensor_parallel_size - 1)]
    return engine.options(
        ray_actor_options=actor,
        placement_group_bundles=[{"CPU": replica.cpus, "GPU": 1.0}, *others],
        placement_group_strategy="STRICT_PACK" if replica.nodes == 1 else "PACK",
    )


def _pool(cluster: ClusterArgs) -> Application:
    deploy = serve.deployment(
        name="EvaluatorPool",
        num_replicas=1,
        health_check_period_s=_HEALTH_PERIOD_S,
        ray_actor_options={"num_cpus": 0},
    )
    return deploy(EvaluatorPool).bind(cluster.memshare)


def _ledger() -> Application:
    deploy = serve.deployment(
        name="LimitLedger",
        num_replicas=1,
        max_ongoing_requests=1024,
        ray_actor_options={"num_cpus": 0},
    )
    return deploy(LimitLedger).bind()


def _board(page: PageConfig) -> Application:
    deploy = serve.deployment(
        name="Board",
        num_replicas=1,
        max_ongoing_requests=1024,  # who waits for a trace must not keep reports out
        health_check_period_s=_HEALTH_PERIOD_S,
        ray_actor_options={"num_cpus": 0},
    )
    return deploy(DashboardHub).bind(page)
