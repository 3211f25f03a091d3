"""Combine the ranks' answers to a job, which may arrive in different engine steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol


class Reducible(Protocol):
    """Something that every rank reports, and that adds up over ranks."""

    def add(self, other: Any) -> None:
        """Add what other ranks report, of the same type."""
        ...


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


class RankReducer:
    """Adds partial results up until every rank has answered."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._partial: dict[int, JobResult] = {}

    def complete(self, results: dict[int, JobResult]) -> Iterator[tuple[int, JobResult]]:
        """Take what some ranks say; yields the jobs that all ranks have answered now."""
        for job_id, result in results.items():
            partial = self._partial.pop(job_id, None)
            if partial is not None:
                result.add(partial)
            if result.ranks < self._world_size:
                self._partial[job_id] = result
            else:
                yield job_id, result
