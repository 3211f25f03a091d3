"""Ranks answer jobs one by one, and perhaps in different engine steps."""

from __future__ import annotations

from collections.abc import Iterator

from memshare.engine.messages import JobResult


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
