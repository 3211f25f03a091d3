"""Stage two from the scheduler's side: candidates go out as jobs, verified pairs come back."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator

from memshare.config import DistanceConfig
from memshare.engine.blocks import BlockBook
from memshare.engine.journal import Journal
from memshare.engine.messages import BlockAt, JobBatch, PairJob, PairResult
from memshare.engine.requests import Candidate, Entry, RequestState
from memshare.engine.roster import Roster
from memshare.policy.base import StagedPolicy

_SAMPLE_BLOCKS = 8  # random blocks of a request that scale its distances (distance.py)


class JobDesk:
    """Every job is answered by all ranks or discarded, once."""

    def __init__(
        self,
        config: DistanceConfig,
        policy: StagedPolicy,
        roster: Roster,
        book: BlockBook,
        journal: Journal,
        world_size: int,
    ) -> None:
        self._config = config
        self._policy = policy
        self._roster = roster
        self._book = book
        self._journal = journal
        self._world_size = world_size
        self._waiting: deque[Candidate] = deque()
        self._running: dict[int, Candidate] = {}
        self._partial: dict[int, PairResult] = {}
        self._last_id = 0
        self._random = random.Random(0)

    def __len__(self) -> int:
        """Candidates that wait for stage two."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Jobs that the workers have not answered yet."""
        return len(self._running)

    def add(self, candidate: Candidate) -> None:
        """Let a candidate wait for stage two, unless it can't come to anything."""
        target = candidate.target
        if target.block is candidate.donor.block:
            self._journal.drop(candidate, "no_gain")
        elif target.index < self._roster.first_target(target.state):
            self._journal.drop(candidate, "protected")
        elif len(self._waiting) >= self._config.max_waiting:
            self._journal.drop(candidate, "stage_two_full")
        else:
            self._waiting.append(candidate)

    def take(self) -> tuple[JobBatch, ...]:
        """This step's jobs, at most ``max_jobs_per_step``, grouped by the target's request."""
        by_request: dict[str, list[PairJob]] = {}
        budget = self._config.max_jobs_per_step
        while self._waiting and budget > 0:
            candidate = self._waiting.popleft()
            if not self._roster.is_current(candidate):
                self._journal.drop(candidate, "stale")
                continue
            budget -= 1
            self._last_id += 1
            self._running[self._last_id] = candidate
            job = PairJob(self._last_id, self._at(candidate.target), self._at(candidate.donor))
            by_request.setdefault(candidate.target.state.request_id, []).append(job)
        batches = []
        for request_id, jobs in by_request.items():
            state = self._roster.get(request_id)
            assert state is not None, "its target was current just now"
            batches.append(JobBatch(tuple(jobs), self._sample(state)))
        return tuple(batches)

    def verified(self, results: dict[int, PairResult]) -> Iterator[Candidate]:
        """Add ranks' partial results up; yields pairs that all ranks together find similar."""
        for job_id, result in results.items():
            partial = self._partial.pop(job_id, None)
            if partial is not None:
                result.total += partial.total
                result.count += partial.count
                result.ranks += partial.ranks
            if result.ranks < self._world_size:
                self._partial[job_id] = result
                continue
            candidate = self._running.pop(job_id)
            if self._is_similar(candidate, result.total / max(result.count, 1)):
                yield candidate

    def _is_similar(self, candidate: Candidate, similarity: float) -> bool:
        tally = self._journal.tally
        tally.add("compared")
        tally.observe_distance(1.0 - similarity)
        threshold = candidate.target.state.options.memshare_block_threshold
        if threshold is None:
            threshold = self._config.similarity_threshold
        similar = similarity >= threshold
        candidate.damage = self._policy.damage(similarity)
        tally.add("verified" if similar else "rejected")
        self._journal.pair(
            "verified" if similar else "rejected", candidate, similarity=round(similarity, 4)
        )
        return similar

    def _at(self, entry: Entry) -> BlockAt:
        return BlockAt(entry.block.block_id, entry.index * self._book.block_size)

    def _sample(self, state: RequestState) -> tuple[BlockAt, ...]:
        table = self._book.table(state.request_id)
        assert table is not None
        # A re-pointed entry holds keys that were turned for another position.
        own = [index for index in range(state.full) if index not in state.repointed]
        chosen = self._random.sample(own, min(_SAMPLE_BLOCKS, len(own)))
        return tuple(BlockAt(table[i].block_id, i * self._book.block_size) for i in chosen)
