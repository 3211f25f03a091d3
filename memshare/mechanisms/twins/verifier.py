"""Stage two for pairs of tokens: twins go out as jobs, and what is known of each token comes back.

What is known is kept in one :class:`~memshare.mechanisms.twins.copies.TokenCopies` per request. A
block whose tokens have good twins elsewhere can be given up; the policy ``twins`` reads that as the
block's coverage.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from memshare.core.rank_reducer import JobResult, RankReducer
from memshare.core.requests import RequestState
from memshare.mechanisms.contract import SchedulerContext
from memshare.mechanisms.twins.copies import TokenCopies
from memshare.mechanisms.twins.messages import TwinBatch
from memshare.search.evaluate import EvaluatorAnswer, Positions, TwinLinks
from memshare.telemetry.stats import DropReason


class _Pairs(NamedTuple):
    """Pairs of tokens of one request."""

    state: RequestState
    generation: int
    earlier: Positions
    later: Positions


class TokenPairVerifier:
    """A :class:`~memshare.mechanisms.remap.scheduler.PairVerifier` of pairs of tokens."""

    def __init__(
        self,
        context: SchedulerContext,
    ) -> None:
        """Start without pairs."""
        self._map = context.tables.token_map
        distance = context.config.distance
        self._per_step = self._map.first_position(distance.max_jobs_per_step)
        self._max_waiting = self._map.first_position(distance.max_waiting)
        self._tracker = context.tracker
        self._tables = context.tables
        self._recorder = context.recorder
        self._counters = context.recorder.counters
        self._reducer = RankReducer(context.world_size)
        self._copies: dict[str, TokenCopies] = {}
        self._waiting: deque[_Pairs] = deque()
        self._waiting_pairs = 0
        self._running: dict[int, list[_Pairs]] = {}
        self._last_id = 0

    def __len__(self) -> int:
        """See :meth:`PairVerifier.__len__`."""
        return self._waiting_pairs

    @property
    def running(self) -> int:
        """See :attr:`PairVerifier.running`."""
        return sum(len(pairs.earlier) for job in self._running.values() for pairs in job)

    def copies_of(self, state: RequestState) -> TokenCopies:
        """What is known of the request's tokens, with room for its full blocks."""
        known = self._copies.get(state.request_id)
        if known is None:
            known = self._copies[state.request_id] = TokenCopies(self._map)
        known.grow(state.full)
        return known

    def propose(self, answer: EvaluatorAnswer) -> None:
        """See :meth:`PairVerifier.propose`."""
        for links in answer.links:
            self._counters.add("candidates", len(links.earlier))
            self._add_links(links)

    def on_tokens(self, state: RequestState) -> None:
        """See :meth:`PairVerifier.on_tokens`. A block leaves the recent window, and may go from now
        on: its distance is observed."""
        index = self._tracker.end_target(state) - 1
        if index >= self._tracker.first_target(state):
            coverage = self.copies_of(state).coverage[index]
            self._counters.observe_distance(1.0 - float(coverage))

    def note_given_up(self, state: RequestState, index: int) -> None:
        """Block ``index`` of the request has been re-pointed."""
        joined = self.copies_of(state).give_up(index)
        self._counters.add("candidates", len(joined[0]))
        self._enqueue(_Pairs(state, state.generation, *joined))

    def forget_request(self, state: RequestState) -> None:
        """See :meth:`PairVerifier.forget_request`. What waits is found stale in its turn."""
        self._copies.pop(state.request_id, None)

    def take_batches(self) -> tuple[TwinBatch, ...]:
        """See :meth:`PairVerifier.take_batches`."""
        job: list[_Pairs] = []
        budget = self._per_step
        while self._waiting and budget > 0:
            pairs = self._waiting.popleft()
            self._waiting_pairs -= len(pairs.earlier)
            if not self._is_current(pairs):
                self._drop(len(pairs.earlier), "stale")
                continue
            if len(pairs.earlier) > budget:
                state, generation, earlier, later = pairs
                self._waiting.appendleft(
                    _Pairs(state, generation, earlier[budget:], later[budget:])
                )
                self._waiting_pairs += len(earlier) - budget
                pairs = _Pairs(state, generation, earlier[:budget], later[:budget])
            pairs = self._living(pairs)
            budget -= len(pairs.earlier)
            if len(pairs.earlier):
                job.append(pairs)
        if not job:
            return ()
        self._last_id += 1
        self._running[self._last_id] = job
        return (TwinBatch(self._last_id, np.concatenate([self._at(p) for p in job], axis=1)),)

    def receive(self, results: dict[int, JobResult]) -> None:
        """See :meth:`PairVerifier.receive`."""
        for job_id, result in self._reducer.complete(results):
            similarity = np.array(result.totals, np.float32) / np.float32(max(result.count, 1))
            start = 0
            for pairs in self._running.pop(job_id):
                end = start + len(pairs.earlier)
                self._learn(pairs, similarity[start:end])
                start = end

    def _learn(self, pairs: _Pairs, similarity: npt.NDArray[np.float32]) -> None:
        counters, similar = self._counters, int((similarity > 0).sum())
        counters.add("compared", len(similarity))
        counters.add("verified", similar)
        counters.add("rejected", len(similarity) - similar)
        if not self._is_current(pairs):
            return
        own = self._are_own(pairs.state, pairs.earlier, pairs.later)
        self.copies_of(pairs.state).learn(pairs.earlier[own], pairs.later[own], similarity[own])
        if not own.all():
            self._keep(pairs, own)
        self._recorder.event(
            "compared", request=pairs.state.request_id, tokens=len(similarity), similar=similar
        )

    def _add_links(self, links: TwinLinks) -> None:
        state = self._tracker.get(links.request_id)
        if state is None or state.generation != links.generation:
            self._drop(len(links.earlier), "unknown_request")
            return
        # What is protected needs no twin, but may be one.
        first = self._map.first_position(self._tracker.first_target(state))
        begin = int(np.searchsorted(links.later, first))
        self._drop(begin, "protected")
        earlier, later = links.earlier[begin:], links.later[begin:]
        # A twin in the same block would go together with its token.
        apart = self._map.entry(earlier) != self._map.entry(later)
        self._drop(int((~apart).sum()), "no_gain")
        earlier, later = earlier[apart], later[apart]
        if len(later) and int(later.max()) >= self._map.first_position(state.full):
            self._drop(len(later), "unavailable")  # not written yet: an answer that can't be right
            return
        self._enqueue(_Pairs(state, state.generation, earlier, later))

    def _enqueue(self, pairs: _Pairs) -> None:
        if self._waiting_pairs + len(pairs.earlier) > self._max_waiting:
            self._drop(len(pairs.earlier), "stage_two_full")
        elif len(pairs.earlier):
            self._waiting.append(pairs)
            self._waiting_pairs += len(pairs.earlier)

    def _living(self, pairs: _Pairs) -> _Pairs:
        """The pairs of which neither token has been given up."""
        if not pairs.state.repointed:
            return pairs
        own = self._are_own(pairs.state, pairs.earlier, pairs.later)
        self._drop(int((~own).sum()), "unavailable")
        self._keep(pairs, own)
        return _Pairs(pairs.state, pairs.generation, pairs.earlier[own], pairs.later[own])

    def _keep(self, pairs: _Pairs, own: npt.NDArray[np.bool_]) -> None:
        """Of the pairs that came too late, those whose later token is there must keep it."""
        late = ~own & self._are_own(pairs.state, pairs.later)
        if late.any():
            kept = self.copies_of(pairs.state).keep(pairs.earlier[late], pairs.later[late])
            self._counters.add("candidates", len(kept[0]))
            self._enqueue(_Pairs(pairs.state, pairs.generation, *kept))

    def _are_own(self, state: RequestState, *ends: Positions) -> npt.NDArray[np.bool_]:
        """``[N]``: whether neither end of each pair lies in a re-pointed entry."""
        repointed = np.zeros(state.full + 1, np.bool_)
        repointed[list(state.repointed)] = True
        gone: npt.NDArray[np.bool_] = np.logical_or.reduce(
            [repointed[self._map.entry(positions)] for positions in ends]
        )
        return ~gone

    def _is_current(self, pairs: _Pairs) -> bool:
        state = pairs.state
        return (
            state.alive
            and state.generation == pairs.generation
            and self._tables.table(state.request_id) is not None
        )

    def _at(self, pairs: _Pairs) -> npt.NDArray[np.int64]:
        """``[4, N]``, as in :class:`TwinBatch`."""
        table = self._tables.table(pairs.state.request_id)
        assert table is not None, "looked at by the caller"
        rows = []
        for positions in (pairs.earlier, pairs.later):
            indices = self._map.entry(positions).tolist()
            blocks = np.fromiter((table[i].block_id for i in indices), np.int64, len(indices))
            rows += [blocks, positions.astype(np.int64)]
        return np.stack(rows)

    def _drop(self, pairs: int, reason: DropReason) -> None:
        if pairs:
            self._counters.add_labelled("dropped", reason, pairs)
