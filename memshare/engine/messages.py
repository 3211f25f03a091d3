"""What the scheduler side and the worker side of the connector say to each other."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)


@dataclass(frozen=True, slots=True)
class BlockAt:
    """A physical block and where its first slot stands in its request.

    Attributes:
        block_id: physical block id.
        position: token position of slot 0.
    """

    block_id: int
    position: int


@dataclass(frozen=True, slots=True)
class PairJob:
    """Stage two's work on one candidate pair."""

    job_id: int
    target: BlockAt
    donor: BlockAt


@dataclass(frozen=True, slots=True)
class JobBatch:
    """Jobs whose targets belong to one request, with random blocks of it to scale distances by."""

    jobs: tuple[PairJob, ...]
    sample: tuple[BlockAt, ...]


@dataclass(frozen=True, eq=False, slots=True)
class TwinBatch:
    """Stage two's work on pairs of tokens, a token and its twin; one job.

    Attributes:
        job_id: the job.
        tokens: ``[4, N]`` int64: block id and position of each token, block id and position of each
            twin. The slot is the position modulo the block size.
    """

    job_id: int
    tokens: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Remap:
    """Re-point entry ``index`` of a request's block table at physical block ``block_id``."""

    request_id: str
    index: int
    block_id: int


@dataclass
class SchedulerMessage(KVConnectorMetadata):
    """Scheduler to workers, once an engine step.

    Attributes:
        remaps: to apply, in order, before the step's forward pass.
        batches: stage-two work.
        tables: the block tables that every worker must have after this step, by request; None
            unless an integrity check is under way.
    """

    remaps: tuple[Remap, ...] = ()
    batches: tuple[JobBatch | TwinBatch, ...] = ()
    tables: dict[str, list[int]] | None = None


@dataclass
class JobResult:
    """Similarities over the ranks that have answered so far.

    Attributes:
        totals: sums, one for each of the job's pairs; divided by ``count`` they are similarities.
        count: how many similarities each sum holds.
        ranks: ranks that have answered.
    """

    totals: list[float]
    count: int
    ranks: int

    def add(self, other: JobResult) -> None:
        """Add what other ranks have found."""
        self.totals = [a + b for a, b in zip(self.totals, other.totals, strict=True)]
        self.count += other.count
        self.ranks += other.ranks


@dataclass
class WorkerMessage(KVConnectorWorkerMetadata):
    """Workers to scheduler, once an engine step; ranks are folded together by :meth:`aggregate`.

    Attributes:
        results: finished stage-two jobs.
        table_faults: differences between a worker's table and the scheduler's; None unless asked.
        check_wanted: an operator asked a worker for an integrity check.
        remap_misses: remaps for requests that a worker did not know.
    """

    results: dict[int, JobResult] = field(default_factory=dict)
    table_faults: list[str] | None = None
    check_wanted: bool = False
    remap_misses: int = 0

    def aggregate(self, other: KVConnectorWorkerMetadata) -> WorkerMessage:
        """Add another rank's message to this one (vllm/.../kv_transfer/kv_connector/utils.py)."""
        assert isinstance(other, WorkerMessage)
        for job_id, theirs in other.results.items():
            ours = self.results.get(job_id)
            if ours is None:
                self.results[job_id] = theirs
            else:
                ours.add(theirs)
        if other.table_faults is not None:
            self.table_faults = [*(self.table_faults or ()), *other.table_faults]
        self.check_wanted |= other.check_wanted
        self.remap_misses += other.remap_misses
        return self


@dataclass
class WorkerHandshake(KVConnectorHandshakeMetadata):
    """What every rank reports once, before the first step.

    Attributes:
        hooked: the worker class is ours, so block tables can be edited.
    """

    hooked: bool
