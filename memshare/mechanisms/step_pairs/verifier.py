"""Stage two for pairs of blocks: candidates go out as jobs, verified pairs come back."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable

from memshare.core.rank_reducer import JobResult, RankReducer
from memshare.core.requests import RequestState
from memshare.mechanisms.contract import SchedulerContext
from memshare.mechanisms.remap.pairs import Candidate, Entry, PairRecorder, own_entry
from memshare.mechanisms.step_pairs.messages import BlockAt, JobBatch, PairJob
from memshare.mechanisms.step_pairs.policy import BlockRef, PairProposal, PairProposer
from memshare.search.evaluate import EvaluatorAnswer, StepMatch

_SAMPLE_BLOCKS = 8  # random blocks of a request that scale its distances (kv/similarity.py)


class BlockPairVerifier:
    """A :class:`~memshare.mechanisms.remap.scheduler.PairVerifier` of pairs of blocks."""

    def __init__(
        self,
        context: SchedulerContext,
        proposer: PairProposer,
        pairs: PairRecorder,
        take_verified: Callable[[Candidate], None],
    ) -> None:
        """Start without candidates.

        Args:
            context: of the mechanism.
            proposer: makes pairs of blocks out of similar steps.
            pairs: counts and logs what becomes of them.
            take_verified: is given each pair that is similar enough.
        """
        self._config = context.config.distance
        self._proposer = proposer
        self._tracker = context.tracker
        self._tables = context.tables
        self._take_verified = take_verified
        self._counters = context.recorder.counters
        self._pairs = pairs
        self._reducer = RankReducer(context.world_size)
        self._waiting: deque[Candidate] = deque()
        self._running: dict[int, Candidate] = {}
        self._last_id = 0
        self._random = random.Random(0)

    def __len__(self) -> int:
        """See :meth:`PairVerifier.__len__`."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """See :attr:`PairVerifier.running`."""
        return len(self._running)

    def propose(self, answer: EvaluatorAnswer) -> None:
        """See :meth:`PairVerifier.propose`."""
        for match in answer.matches:
            if not self._may_pair(match):
                self._counters.add_labelled("dropped", "unknown_request")
                continue
            for pair in self._proposer.propose(match.later, match.earlier, self._tables.token_map):
                self._counters.add("candidates")
                candidate = self._candidate(pair)
                if candidate is None:
                    self._counters.add_labelled("dropped", "unavailable")
                    continue
                self._pairs.transition(
                    "candidate", candidate, similarity=round(match.similarity, 4)
                )
                self._enqueue(candidate)

    def on_tokens(self, state: RequestState) -> None:
        """See :meth:`PairVerifier.on_tokens`."""

    def forget_request(self, state: RequestState) -> None:
        """See :meth:`PairVerifier.forget_request`. What waits is found stale in its turn."""

    def _may_pair(self, match: StepMatch) -> bool:
        """Both requests live and share a history. Answers are not trusted to respect tenants."""
        later = self._tracker.get(match.later.request_id)
        earlier = self._tracker.get(match.earlier.request_id)
        return later is not None and earlier is not None and later.history == earlier.history

    def _candidate(self, pair: PairProposal) -> Candidate | None:
        target, donor = self._entry(pair.target), self._entry(pair.donor)
        return None if target is None or donor is None else Candidate(target, donor)

    def _entry(self, ref: BlockRef) -> Entry | None:
        span = ref.span
        return own_entry(self._tracker, self._tables, span.request_id, span.generation, ref.index)

    def _enqueue(self, candidate: Candidate) -> None:
        """Let a candidate wait for stage two, unless it can't come to anything."""
        target = candidate.target
        if target.block is candidate.donor.block:
            self._pairs.dropped(candidate, "no_gain")
        elif target.index < self._tracker.first_target(target.state):
            self._pairs.dropped(candidate, "protected")
        elif len(self._waiting) >= self._config.max_waiting:
            self._pairs.dropped(candidate, "stage_two_full")
        else:
            self._waiting.append(candidate)

    def take_batches(self) -> tuple[JobBatch, ...]:
        """This step's jobs, at most ``max_jobs_per_step``, grouped by the target's request."""
        by_request: dict[str, list[PairJob]] = {}
        budget = self._config.max_jobs_per_step
        while self._waiting and budget > 0:
            candidate = self._waiting.popleft()
            if not candidate.is_current(self._tables):
                self._pairs.dropped(candidate, "stale")
                continue
            budget -= 1
            self._last_id += 1
            self._running[self._last_id] = candidate
            job = PairJob(self._last_id, self._at(candidate.target), self._at(candidate.donor))
            by_request.setdefault(candidate.target.state.request_id, []).append(job)
        batches = []
        for request_id, jobs in by_request.items():
            state = self._tracker.get(request_id)
            assert state is not None, "its target was current just now"
            batches.append(JobBatch(tuple(jobs), self._sample(state)))
        return tuple(batches)

    def receive(self, results: dict[int, JobResult]) -> None:
        """See :meth:`PairVerifier.receive`. Pairs that are similar go to the reclaim queue."""
        for job_id, result in self._reducer.complete(results):
            candidate = self._running.pop(job_id)
            if self._is_similar(candidate, result.totals[0] / max(result.count, 1)):
                self._take_verified(candidate)

    def _is_similar(self, candidate: Candidate, similarity: float) -> bool:
        self._counters.add("compared")
        self._counters.observe_distance(1.0 - similarity)
        threshold = candidate.target.state.options.memshare_block_threshold
        if threshold is None:
            threshold = self._config.similarity_threshold
        similar = similarity >= threshold
        candidate.damage = self._proposer.damage(similarity)
        self._counters.add("verified" if similar else "rejected")
        self._pairs.transition(
            "verified" if similar else "rejected", candidate, similarity=round(similarity, 4)
        )
        return similar

    def _at(self, entry: Entry) -> BlockAt:
        return BlockAt(entry.block.block_id, self._tables.token_map.first_position(entry.index))

    def _sample(self, state: RequestState) -> tuple[BlockAt, ...]:
        table = self._tables.table(state.request_id)
        assert table is not None
        # A re-pointed entry holds keys that were turned for another position.
        own = [index for index in range(state.full) if index not in state.repointed]
        chosen = self._random.sample(own, min(_SAMPLE_BLOCKS, len(own)))
        first_position = self._tables.token_map.first_position
        return tuple(BlockAt(table[i].block_id, first_position(i)) for i in chosen)
