"""No replica is left: whoever asks is told so at once, and when to come again.

Ray Serve lets requests wait in the proxy until there is a replica. While one is being exchanged on
purpose that is right: the old one was healthy, and none has to fail. After a crash a new engine
needs from half a minute to many minutes, and what waits is cut off by clients and gateways, who
learn nothing from that; a health check that waits tells a load balancer nothing either.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

_PROBE_S = 2.0  # an answer later than this is as good: the replica lives


def try_again(retry_after_s: int) -> str:
    """What callers are told, whatever their protocol, and when they shall come again."""
    return f"the engine has died and is being replaced; try again in {retry_after_s} s"


class NoReplicaHTTPError(BackPressureError):
    """HTTP 503 with ``Retry-After``, and an error in OpenAI's format."""

    def __init__(self, retry_after_s: int) -> None:
        """``retry_after_s``: seconds after which the client should try again."""
        super().__init__(0, 0, 503, retry_after_s)
        self.args = (retry_after_s,)  # what pickle makes it from

    @property
    def message(self) -> dict[str, Any]:  # type: ignore[override]  # Ray Serve makes JSON of it
        """The body of the answer."""
        error = {
            "message": str(self),
            "type": "ServiceUnavailableError",  # as vLLM's own
            "param": None,
            "code": 503,
        }
        return {"error": error}

    def __str__(self) -> str:
        """What went wrong, in words."""
        return try_again(self.args[0])


class NoReplicaError(DeploymentUnavailableError):
    """gRPC ``UNAVAILABLE``; also for callers that hold a handle."""

    def __init__(self, retry_after_s: int) -> None:
        """``retry_after_s``: seconds after which the caller should try again."""
        self.args = (retry_after_s,)

    @property
    def message(self) -> str:
        """The status's details."""
        return try_again(self.args[0])

    def __str__(self) -> str:
        """The same."""
        return self.message


class RefusesWithoutReplicas(RequestRouter):
    """To be mixed into a router, before Ray Serve's class."""

    unavailable_s: int
    """Seconds; to be set by ``initialize_state``."""
    _is_out = False  # the last replica has died, and no other has come

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, *, is_retry: bool = False
    ) -> RunningReplica:
        """As in Ray Serve.

        Raises:
            NoReplicaHTTPError, NoReplicaError: there is no replica, and there won't be one soon.
        """
        if self._is_out:
            raise self._refusal(pending_request)
        try:
            return await super()._choose_replica_for_request(pending_request, is_retry=is_retry)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():  # the client has left
                raise
            raise self._refusal(pending_request) from None

    def _refusal(self, request: PendingRequest) -> NoReplicaHTTPError | NoReplicaError:
        if request.metadata.is_http_request:
            return NoReplicaHTTPError(self.unavailable_s)
        return NoReplicaError(self.unavailable_s)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """This router has found out by itself."""
        super().on_replica_actor_died(replica_id)
        if not self._replicas:
            self._give_up()

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Ray Serve's controller says which replicas there are."""
        before = list(self._replicas.values())
        super().update_replicas(replicas)
        if replicas:
            self._is_out = False
        elif before:
            self._looking = self._event_loop.create_task(self._look_after(before))

    async def _look_after(self, gone: Sequence[RunningReplica]) -> None:
        """Tell replicas that have died from those that stop on purpose, which still answer."""
        for replica in gone:
            try:
                await asyncio.wait_for(replica.get_queue_len(deadline_s=_PROBE_S), _PROBE_S)
            except RayActorError:
                continue
            except TimeoutError:
                return
            return
        if not self._replicas:
            self._give_up()

    def _give_up(self) -> None:
        self._is_out = True
        for request in self._pending_requests_to_fulfill:
            request.future.cancel()
