"""What the two halves of a remap say to each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from memshare.core.rank_reducer import JobResult


@dataclass(frozen=True, slots=True)
class Remap:
    """Re-point entry ``index`` of a request's block table at physical block ``block_id``."""

    request_id: str
    index: int
    block_id: int


class Batch(Protocol):
    """Stage-two work: what exactly is compared, a mechanism and its worker part agree on."""

    def pairs_by_job(self) -> Mapping[int, int]:
        """How many pairs each of its jobs compares, by job id."""
        ...


@dataclass(frozen=True, slots=True)
class RemapCommands:
    """Scheduler to workers.

    Attributes:
        remaps: to apply, in order, before the step's forward pass.
        batches: to compare behind it.
    """

    remaps: tuple[Remap, ...] = ()
    batches: tuple[Batch, ...] = ()


@dataclass
class RemapResults:
    """Workers to scheduler.

    Attributes:
        results: finished comparisons by job id.
        misses: remaps for requests that a worker did not know.
    """

    results: dict[int, JobResult] = field(default_factory=dict)
    misses: int = 0

    def add(self, other: RemapResults) -> None:
        """Add what another rank reports."""
        for job_id, theirs in other.results.items():
            ours = self.results.get(job_id)
            if ours is None:
                self.results[job_id] = theirs
            else:
                ours.add(theirs)
        self.misses += other.misses
