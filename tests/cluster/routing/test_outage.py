"""What callers are told while no replica is left: our router as Ray Serve uses it."""

from __future__ import annotations

import asyncio
import json
import pickle
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from ray.serve._private.common import (
    DeploymentHandleSource,
    DeploymentID,
    ReplicaID,
    RequestMetadata,
    RequestProtocol,
)
from ray.serve._private.grpc_util import get_grpc_response_status
from ray.serve._private.http_util import get_http_response_status, send_http_response_on_exception
from ray.serve.request_router import PendingRequest

from cluster.config import RoutingConfig
from cluster.routing.outage import NoReplicaError, NoReplicaHTTPError, try_again
from cluster.routing.router import KVRouter
from cluster.tenancy.call import LOCAL, Call, Caller
from cluster.tenancy.keys import MemSharePermissions
from cluster.tenancy.limits import Limits

DEPLOYMENT = DeploymentID(name="Engine", app_name="memshare")
TEXT = "the engine has died and is being replaced; try again in 17 s"


class Replica:
    """What a router sees of a running replica."""

    max_ongoing_requests = 8

    def __init__(self, name: str, lives: bool = True) -> None:
        self.replica_id = ReplicaID(name, DEPLOYMENT)
        self.routing_stats: dict[str, float] = {}
        self.multiplexed_model_ids: set[str] = set()
        self.lives = lives

    async def get_queue_len(self, *, deadline_s: float) -> int:
        if not self.lives:
            raise ActorDiedError
        return 0


@pytest.fixture
async def router() -> KVRouter:
    made = KVRouter(
        deployment_id=DEPLOYMENT,
        handle_source=DeploymentHandleSource.UNKNOWN,
        use_replica_queue_len_cache=True,
    )
    made.initialize_state(**RoutingConfig().model_dump(), unavailable_s=17)
    return made


def ask(router: Any, protocol: RequestProtocol = RequestProtocol.HTTP) -> asyncio.Task[Replica]:
    """A request that comes to the router."""
    metadata = RequestMetadata(request_id="r", internal_request_id=str(ask))
    metadata._request_protocol = protocol
    request = PendingRequest(args=[], kwargs={}, metadata=metadata)
    return asyncio.ensure_future(router._choose_replica_for_request(request))


def update(router: Any, *replicas: Replica) -> None:
    router.update_replicas(list(replicas))


async def soon(task: asyncio.Task[Replica]) -> Replica:
    return await asyncio.wait_for(task, 60)


async def is_waiting(task: asyncio.Task[Replica]) -> bool:
    done, _ = await asyncio.wait([task], timeout=0.2)
    return not done


async def test_who_waits_and_who_comes_is_refused_when_the_last_replica_has_died(
    router: KVRouter,
) -> None:
    only = Replica("a")
    update(router, only)
    assert await soon(ask(router)) is only
    router.on_replica_actor_died(only.replica_id)
    with pytest.raises(NoReplicaHTTPError, match="try again in 17 s"):
        await soon(ask(router))
    with pytest.raises(NoReplicaError, match="try again in 17 s"):
        await soon(ask(router, RequestProtocol.GRPC))
    update(router, new := Replica("b"))
    assert await soon(ask(router)) is new


async def test_a_replica_that_dies_beside_others_changes_nothing(router: KVRouter) -> None:
    update(router, Replica("a"), other := Replica("b"))
    router.on_replica_actor_died(ReplicaID("a", DEPLOYMENT))
    assert await soon(ask(router)) is other


@pytest.mark.parametrize("lives", [True, False])
async def test_the_controllers_word_tells_a_crash_from_an_exchange(
    router: KVRouter, lives: bool
) -> None:
    update(router, old := Replica("a"))
    await asyncio.sleep(0)  # it asks a new replica for its queue
    old.lives = lives
    update(router)
    early = ask(router)
    if lives:  # it stops on purpose: requests go to the one that takes its place
        assert await is_waiting(early)
        update(router, new := Replica("b"))
        assert await soon(early) is new
    else:
        with pytest.raises(NoReplicaHTTPError):
            await soon(early)
        with pytest.raises(NoReplicaHTTPError):
            await soon(ask(router))


async def test_a_client_that_leaves_is_not_refused(router: KVRouter) -> None:
    update(router, Replica("a"))
    await asyncio.sleep(0)
    update(router)
    waiting = ask(router)
    assert await is_waiting(waiting)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


def test_over_http_it_is_a_503_with_a_time_to_come_again() -> None:
    error = pickle.loads(pickle.dumps(NoReplicaHTTPError(17)))
    status = get_http_response_status(error, None, "r")
    start, body = send_http_response_on_exception(status, response_started=False)
    headers = {bytes(name): bytes(value) for name, value in start["headers"]}
    assert start["status"] == 503
    assert headers[b"retry-after"] == b"17"
    assert headers[b"content-type"] == b"application/json"
    assert json.loads(body["body"])["error"] == {
        "message": TEXT, "type": "ServiceUnavailableError", "param": None, "code": 503,
    }  # fmt: skip


def test_over_grpc_it_is_unavailable() -> None:
    error = pickle.loads(pickle.dumps(NoReplicaError(17)))
    status = get_grpc_response_status(error, None, "r")
    assert (status.code.name, status.message) == ("UNAVAILABLE", TEXT)  # type: ignore[union-attr]


@pytest.mark.engine  # vLLM is loaded
async def test_a_dead_engine_ends_its_requests_with_an_error_that_may_be_tried_again() -> None:
    from vllm.entrypoints.serve import create_error_response
    from vllm.exceptions import RetryableRequestError
    from vllm.v1.engine.exceptions import EngineDeadError

    from cluster.engine.client import _run

    async def outputs() -> AsyncGenerator[Any, None]:
        yield "one"
        raise EngineDeadError

    caller = Caller(LOCAL, Limits(None, None), None, None, True, MemSharePermissions())
    call = Call(caller, "")
    passed_on = _run(outputs(), call, "r", 0, 17)
    assert await anext(passed_on) == "one"
    with pytest.raises(RetryableRequestError) as caught:
        await anext(passed_on)
    # This is what vLLM writes into a stream, and, with the status, as a whole answer.
    described = create_error_response(caught.value).error
    assert (described.code, described.type) == (503, "ServiceUnavailableError")
    assert described.message == TEXT == try_again(17)
