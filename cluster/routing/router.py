"""Ray Serve's side of :mod:`cluster.routing.choice`: in every proxy, and wherever a handle is."""

from __future__ import annotations

from random import Random
from typing import Any

from ray.serve._private.common import DeploymentHandleSource
from ray.serve.config import RequestRouterConfig
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter
from ray.serve.request_router import PendingRequest, ReplicaID, RunningReplica

from cluster.config import RoutingConfig
from cluster.grpc.hop import warn_of_small_replies
from cluster.routing.choice import Routing
from cluster.routing.load import from_stats
from cluster.routing.outage import RefusesWithoutReplicas


class KVRouter(RefusesWithoutReplicas, ConsistentHashRouter):
    """Homes for sessions, and the better of two replicas for everybody else.

    Ray Serve's own router by session lends the loop that gives each request the replica which was
    chosen for it, and no other; who is chosen is decided by
    :class:`~cluster.routing.choice.Routing`. A replica that refuses because it is full makes way
    for the next rank.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        """Take the fields of :class:`~cluster.config.RoutingConfig`, and ``unavailable_s``: when
        clients are told to come again while there is no replica."""
        if self._handle_source == DeploymentHandleSource.PROXY:
            warn_of_small_replies()
        self.unavailable_s = kwargs.pop("unavailable_s")
        config = RoutingConfig.model_validate(kwargs)
        if config.sessions:
            # A home that is slow to answer is the home all the same: after Ray's tenth of a second
            # the session would go elsewhere, and compute there what is cached here.
            self.queue_len_response_deadline_s = self.max_queue_len_response_deadline_s
        self._routing = Routing(config, Random())
        self._ids: dict[str, ReplicaID] = {}

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Take the replicas there are now, each with its latest report."""
        super().update_replicas(replicas)
        for replica in replicas:
            self._routing.report(replica.replica_id.unique_id, from_stats(replica.routing_stats))

    def _rebuild_ring(self, new_snapshot: frozenset[ReplicaID]) -> None:
        # Called for changed sets only. The base class's own ring stays empty.
        self._replica_set_snapshot = new_snapshot
        self._ids = {replica_id.unique_id: replica_id for replica_id in new_snapshot}
        self._routing.set_replicas(self._ids.keys())

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Ranks of replicas for one request, best first."""
        session = kind = ""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
            session = pending_request.metadata.session_id
            kind = pending_request.metadata.multiplexed_model_id
        ranks = self._routing.rank(session, self._ongoing, kind)
        found = [
            [self._replicas[key] for name in rank if (key := self._ids[name]) in self._replicas]
            for rank in ranks
        ]
        return [rank for rank in found if rank]

    def _ongoing(self, name: str) -> int | None:
        return self._replica_queue_len_cache.get(self._ids[name])


def router_config(routing: RoutingConfig, unavailable_s: int) -> RequestRouterConfig:
    """The router of a deployment: Ray Serve's own where ours would choose the same replicas. Ray
    Serve's lets requests wait while there is no replica.

    Args:
        routing: how replicas are chosen.
        unavailable_s: see ``replica.unavailable_retry_after_s``.
    """
    if not routing.sessions and routing.load == "requests" and not routing.kinds:
        return RequestRouterConfig()
    options: dict[str, Any] = {
        "request_router_class": KVRouter,
        "request_router_kwargs": {**routing.model_dump(), "unavailable_s": unavailable_s},
        "request_routing_stats_period_s": routing.report_period_s,
    }
    return RequestRouterConfig(**options)
