"""A replica with the gRPC methods and no engine, for Ray Serve's processes to import."""

from __future__ import annotations

import os

from cluster.config import ClusterArgs
from cluster.grpc.service import GrpcService
from cluster.tenancy.gate import Gate
from cluster.tenancy.limits import Ledger, Limiter, LocalLedgerClient
from tests.stand_in import StandIn


class Counts:
    """Counts nothing."""

    def count(self, name: str, *values: str, by: int = 1) -> None:
        pass


class Replica(GrpcService):
    """A replica without an engine."""

    def __init__(self) -> None:
        gate = Gate(None, Limiter(LocalLedgerClient(Ledger()), "r"), Counts())
        self.engine = StandIn()
        self._start_grpc(
            ClusterArgs(model="m", replicas=2),
            gate,
            self.engine,  # type: ignore[arg-type]
        )

    async def running(self) -> tuple[int, list[str]]:
        """The replica's process, and the engine's ids of the requests that run in it."""
        return os.getpid(), list(self.engine.running)
