"""A replica without an engine, for tests of what Ray Serve does with replicas.

It writes words instead of tokens, and reports the load that a file says. Everything around it is
the product's: its router, its autoscaling policy, its limits (:func:`cluster.app.serving`).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.generated.serve_pb2 import UserDefinedMessage, UserDefinedResponse
from starlette.responses import StreamingResponse
from starlette.types import ASGIApp

from cluster.app import serving
from cluster.config import ClusterArgs, parse_cluster_args
from cluster.http.asgi import KeyGate
from cluster.replica import EngineReplica
from cluster.routing.load import Load, to_stats
from cluster.telemetry.metrics import ReplicaMetrics
from cluster.tenancy.gate import Gate
from cluster.tenancy.limits import Ledger, Limiter, LocalLedgerClient

api = FastAPI()


@serve.ingress(api)
class StandIn:
    """Not an engine.

    Its load is in ``load_file``: JSON, replica id (or ``all``) to the fields of a load.
    """

    def __init__(self, load_file: Path, version: str) -> None:
        self._load_file = load_file
        self._version = version
        self._id = serve.get_replica_context().replica_id.unique_id

    @api.get("/who")
    def who(self) -> dict[str, str]:
        return {"replica": self._id, "version": self._version}

    @api.get("/stream")
    def stream(self, seconds: float) -> StreamingResponse:
        """The replica's id, a word every 50 ms, and ``end``."""
        return StreamingResponse(self._words(seconds), media_type="text/plain")

    async def Method1(self, request: UserDefinedMessage) -> UserDefinedResponse:  # noqa: N802
        """The same over gRPC: waits for ``num`` seconds."""
        await asyncio.sleep(request.num)
        return UserDefinedResponse(greeting=self._id)

    async def record_routing_stats(self) -> dict[str, float]:
        loads = json.loads(self._load_file.read_text())
        fields = loads.get(self._id) or loads.get("all")
        return to_stats(Load(**fields)) if fields else {}

    async def record_autoscaling_stats(self) -> dict[str, float]:
        return await self.record_routing_stats()

    async def _words(self, seconds: float) -> AsyncIterator[str]:
        yield f"{self._id}\n"
        for _ in range(round(seconds / 0.05)):
            await asyncio.sleep(0.05)
            yield "word\n"
        yield "end\n"


def stand_in(cluster: ClusterArgs, load_file: Path, version: str = "1") -> Application:
    """An application of stand-ins, deployed as engines are."""
    deployment = serving(cluster, "StandIn")(StandIn)
    return deployment.options(ray_actor_options={"num_cpus": 0}).bind(load_file, version)


words = FastAPI()


@words.get("/health")
def health() -> None:
    """Answers as long as the gate lets it."""


@words.post("/v1/completions")
def complete(until: Path) -> StreamingResponse:
    """A word every 50 ms until there is such a file, and ``end``."""

    async def say() -> AsyncIterator[str]:
        yield "word\n"
        while not until.exists():
            await asyncio.sleep(0.05)
            yield "word\n"
        yield "end\n"

    return StreamingResponse(say(), media_type="text/plain")


@serve.ingress()
class Gated:
    """Not an engine, but behind the product's gate, which closes as a replica's does."""

    close = EngineReplica.close

    def __init__(self, args: ClusterArgs) -> None:
        replica = serve.get_replica_context().replica_id.unique_id
        limiter = Limiter(LocalLedgerClient(Ledger()), replica)
        self._args = args
        self._gate = Gate(None, limiter, ReplicaMetrics(args.public_name, replica))

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        return KeyGate(words, self._gate)


def gated(args: Mapping[str, object]) -> Application:
    """For ``import_path``: an application of :class:`Gated`."""
    cluster = parse_cluster_args(args)
    deployment = serving(cluster, "Gated")(Gated)
    return deployment.options(ray_actor_options={"num_cpus": 0}).bind(cluster)
