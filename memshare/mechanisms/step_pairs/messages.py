"""Stage-two work on pairs of blocks, as it goes to the workers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


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

    def pairs_by_job(self) -> Mapping[int, int]:
        """See :meth:`~memshare.mechanisms.remap.messages.Batch.pairs_by_job`."""
        return {job.job_id: 1 for job in self.jobs}
