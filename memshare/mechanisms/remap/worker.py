"""The worker part of every mechanism that remaps: table edits, and comparisons behind the step."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from memshare.core.interfaces import WorkerTables
from memshare.core.rank_reducer import JobResult
from memshare.kv.host_copy import HostCopy
from memshare.kv.similarity import PairSums
from memshare.mechanisms.contract import WorkerPart
from memshare.mechanisms.remap.messages import Batch, RemapCommands, RemapResults


class Comparer(Protocol):
    """Stage two of a mechanism, on one rank."""

    def compare(self, batch: Any) -> PairSums:
        """Compare a batch's pairs. On a GPU this only enqueues work behind the forward pass."""
        ...


class RemapWorkerPart(WorkerPart):
    """Edits the table before a step, compares behind it.

    Attributes:
        comparer: None for a mechanism that compares nothing.
    """

    def __init__(self, tables: WorkerTables, comparer: Comparer | None = None) -> None:
        self.comparer = comparer
        self._tables = tables
        self._batches: tuple[Batch, ...] = ()
        self._pending: deque[_Pending] = deque()
        self._misses = 0

    def before_step(self, commands: RemapCommands) -> None:
        """Apply the step's remaps."""
        self._batches = commands.batches
        for remap in commands.remaps:
            if not self._tables.repoint(remap.request_id, remap.index, remap.block_id):
                self._misses += 1

    def after_step(self) -> RemapResults | None:
        """Start this step's comparisons, and return what is ready; None if nothing is."""
        if self._batches and self.comparer is not None:
            self._launch(self.comparer, self._batches)
            self._batches = ()
        if not self._pending and not self._misses:
            return None
        results = self._collect()
        if not results and not self._misses:
            return None
        misses, self._misses = self._misses, 0
        return RemapResults(results, misses)

    @torch.inference_mode()
    def _launch(self, comparer: Comparer, batches: Sequence[Batch]) -> None:
        for batch in batches:
            sums = comparer.compare(batch)
            self._pending.append(_Pending.start(tuple(batch.pairs_by_job()), sums))

    def _collect(self) -> dict[int, JobResult]:
        """Results that have reached the host; never waits for the device."""
        results: dict[int, JobResult] = {}
        while self._pending and self._pending[0].is_ready():
            results.update(self._pending.popleft().results())
        return results


@dataclass(frozen=True, slots=True)
class _Pending:
    """Sums of one batch on their way to the host, as many for each job."""

    job_ids: tuple[int, ...]
    totals: HostCopy
    count: int

    @classmethod
    def start(cls, job_ids: tuple[int, ...], sums: PairSums) -> _Pending:
        return cls(job_ids, HostCopy.start(sums.total), sums.count)

    def is_ready(self) -> bool:
        return self.totals.is_ready()

    def results(self) -> dict[int, JobResult]:
        by_job = self.totals.tensor.view(len(self.job_ids), -1).tolist()
        return {
            job_id: JobResult(totals, self.count, ranks=1)
            for job_id, totals in zip(self.job_ids, by_job, strict=True)
        }
