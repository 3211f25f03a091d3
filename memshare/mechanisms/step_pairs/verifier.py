"""Stage two for pairs of blocks: candidates go out as jobs, verified pairs come back."""

from __future__ import annotations

import random
from collections import deque

from memshare.config import DistanceConfig
from memshare.core.rank_reducer import RankReducer
from memshare.core.reclaimer import Reclaimer
from memshare.core.request_tracker import RequestTracker
from memshare.core.requests import Candidate, Entry, RequestState
from memshare.engine.messages import BlockAt, JobBatch, JobResult, PairJob
from memshare.engine.vllm_0_32.block_tables import BlockTables
from memshare.mechanisms.remap.policy import PairProposal, StagedPolicy
from memshare.search.evaluate import Answer, StepMatch
from memshare.telemetry.recorder import Recorder

_SAMPLE_BLOCKS = 8  # random blocks of a request that scale its distances (distance.py)


class BlockPairVerifier:
    """:class:`~memshare.mechanisms.remap.verifier.PairVerifier` of a staged policy."""

    def __init__(
        self,
        config: DistanceConfig,
        policy: StagedPolicy,
        tracker: RequestTracker,
        tables: BlockTables,
        reclaimer: Reclaimer,
        recorder: Recorder,
        world_size: int,
    ) -> None:
        self._config = config
        self._policy = policy
        self._tracker = tracker
        self._tables = tables
        self._reclaimer = reclaimer
        self._recorder = recorder
        self._gather = RankReducer(world_size)
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

    def propose(self, answer: Answer) -> None:
        """See :meth:`PairVerifier.propose`."""
        counters = self._recorder.counters
        for match in answer.matches:
            if not self._may_pair(match):
                counters.add_labelled("dropped", "unknown_request")
                continue
            for pair in self._policy.propose(match.later, match.earlier, self._tables.token_map):
                counters.add("candidates")
                candidate = self._candidate(pair)
                if candidate is None:
                    counters.add_labelled("dropped", "unavailable")
                    continue
                self._recorder.pair("candidate", candidate, similarity=round(match.similarity, 4))
                self._add(candidate)

    def grown(self, state: RequestState) -> None:
        """See :meth:`PairVerifier.grown`."""

    def forget(self, state: RequestState) -> None:
        """See :meth:`PairVerifier.forget`. What waits is found stale in its turn."""

    def _may_pair(self, match: StepMatch) -> bool:
        """Both requests live and share a history. Answers are not trusted to respect tenants."""
        later = self._tracker.get(match.later.request_id)
        earlier = self._tracker.get(match.earlier.request_id)
        return later is not None and earlier is not None and later.history == earlier.history

    def _candidate(self, pair: PairProposal) -> Candidate | None:
        target, donor = self._tracker.entry(pair.target), self._tracker.entry(pair.donor)
        return None if target is None or donor is None else Candidate(target, donor)

    def _add(self, candidate: Candidate) -> None:
        """Let a candidate wait for stage two, unless it can't come to anything."""
        target = candidate.target
        if target.block is candidate.donor.block:
            self._recorder.drop(candidate, "no_gain")
        elif target.index < self._tracker.first_target(target.state):
            self._recorder.drop(candidate, "protected")
        elif len(self._waiting) >= self._config.max_waiting:
            self._recorder.drop(candidate, "stage_two_full")
        else:
            self._waiting.append(candidate)

    def take(self) -> tuple[JobBatch, ...]:
        """This step's jobs, at most ``max_jobs_per_step``, grouped by the target's request."""
        by_request: dict[str, list[PairJob]] = {}
        budget = self._config.max_jobs_per_step
        while self._waiting and budget > 0:
            candidate = self._waiting.popleft()
            if not self._tracker.is_current(candidate):
                self._recorder.drop(candidate, "stale")
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
        """See :meth:`PairVerifier.receive`. Pairs that are similar go to the reclaimer."""
        for job_id, result in self._gather.complete(results):
            candidate = self._running.pop(job_id)
            if self._is_similar(candidate, result.totals[0] / max(result.count, 1)):
                self._reclaimer.add(candidate)

    def _is_similar(self, candidate: Candidate, similarity: float) -> bool:
        counters = self._recorder.counters
        counters.add("compared")
        counters.observe_distance(1.0 - similarity)
        threshold = candidate.target.state.options.memshare_block_threshold
        if threshold is None:
            threshold = self._config.similarity_threshold
        similar = similarity >= threshold
        candidate.damage = self._policy.damage(similarity)
        counters.add("verified" if similar else "rejected")
        self._recorder.pair(
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
