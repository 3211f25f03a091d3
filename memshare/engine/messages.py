"""What the scheduler side and the worker side of the connector say to each other."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from memshare.core.rank_reducer import Reducible
from memshare.moe.experts import ExpertCounts


@dataclass
class SchedulerMessage(KVConnectorMetadata):
    """Scheduler to workers, once an engine step.

    Attributes:
        commands: of each mechanism that has any, by policy name.
        tables: the block tables that every worker must have after this step, by request; None
            unless an integrity check is under way.
    """

    commands: dict[str, object] = field(default_factory=dict)
    tables: dict[str, list[int]] | None = None


@dataclass
class WorkerHandshake(KVConnectorHandshakeMetadata):
    """What every rank reports once, before the first step.

    Attributes:
        hooked: the worker class is ours, so block tables can be edited.
        family: key of the adapters that share this rank's cache; None if none do.
        policy: that runs on it; None if nothing is reclaimed.
    """

    hooked: bool
    family: str | None = None
    policy: str | None = None


@dataclass
class WorkerMessage(KVConnectorWorkerMetadata):
    """Workers to scheduler, once an engine step; ranks are folded together by :meth:`aggregate`.

    Attributes:
        results: of each mechanism that reports any, by policy name.
        table_faults: differences between a worker's table and the scheduler's; None unless asked.
        check_wanted: an operator asked a worker for an integrity check.
        experts: of a step, or None. One rank of those that choose alike tells.
        handshakes: of ranks that could not report before the first step.
    """

    results: dict[str, Reducible] = field(default_factory=dict)
    table_faults: list[str] | None = None
    check_wanted: bool = False
    experts: ExpertCounts | None = None
    handshakes: list[WorkerHandshake] = field(default_factory=list)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> WorkerMessage:
        """Add another rank's message to this one (vllm/.../kv_transfer/kv_connector/utils.py)."""
        assert isinstance(other, WorkerMessage)
        for name, theirs in other.results.items():
            ours = self.results.get(name)
            if ours is None:
                self.results[name] = theirs
            else:
                ours.add(theirs)
        if other.table_faults is not None:
            self.table_faults = [*(self.table_faults or ()), *other.table_faults]
        self.check_wanted |= other.check_wanted
        self.experts = self.experts or other.experts
        self.handshakes += other.handshakes
        return self
