"""Stage two for pairs of tokens: twins go out as jobs, and what is known of each token comes back.

For every token of a request its best living twin is kept. A block whose worst covered tokens have
good twins can be given up; the policy ``twins`` reads that as the block's coverage.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from memshare.config import DistanceConfig
from memshare.engine.blocks import BlockBook
from memshare.engine.journal import Journal
from memshare.engine.messages import JobResult, TwinBatch
from memshare.engine.ranks import RankGather
from memshare.engine.requests import RequestState
from memshare.engine.roster import Roster
from memshare.evaluate import Answer, TwinLinks
from memshare.stats import DropReason
from memshare.twins import Positions


class TwinMap:
    """What is known of one request's tokens, by token position."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._twins: Positions = np.full(0, -1, np.int32)  # -1: none
        self._similarity = np.zeros(0, np.float32)
        # Stands for a token that was given up; must not go itself while it has no twin.
        self._needed = np.zeros(0, np.bool_)
        self._blocks: _BlockView | None = None  # the same by block, if still right

    def grow(self, blocks: int) -> None:
        """Make room for so many blocks."""
        missing = blocks * self._block_size - len(self._twins)
        if missing > 0:
            missing += len(self._twins) // 2
            self._twins = np.append(self._twins, np.full(missing, -1, np.int32))
            self._similarity = np.append(self._similarity, np.zeros(missing, np.float32))
            self._needed = np.append(self._needed, np.zeros(missing, np.bool_))
            self._blocks = None

    def learn(
        self, earlier: Positions, later: Positions, similarity: npt.NDArray[np.float32]
    ) -> None:
        """Take compared pairs; a token keeps the twin that is most similar, the newest of equals.

        Args:
            earlier: ``[N]`` tokens; one may occur more than once.
            later: ``[N]`` their twins, in other blocks.
            similarity: ``[N]``, 1 is identical, 0 is as unlike as random tokens, or negative.
        """
        better = (similarity > 0) & (similarity >= self._similarity[earlier])
        earlier, later, similarity = earlier[better], later[better], similarity[better]
        order = np.argsort(similarity, kind="stable")  # of repeated ones the last stays
        self._twins[earlier[order]] = later[order]
        self._similarity[earlier[order]] = similarity[order]
        self._blocks = None

    def give_up(self, index: int) -> tuple[Positions, Positions]:
        """Block ``index`` is re-pointed; its tokens live on in their twins.

        Returns:
            Tokens elsewhere whose twin was in the block, and the twins of those: pairs that are now
            worth comparing.
        """
        start, end = index * self._block_size, (index + 1) * self._block_size
        twins = self._twins[start:end]
        self._needed[twins[twins >= 0]] = True
        orphans = np.flatnonzero((self._twins >= start) & (self._twins < end)).astype(np.int32)
        heirs = self._twins[self._twins[orphans]]
        self._twins[orphans] = -1
        self._similarity[orphans] = 0.0
        self._similarity[start:end] = 0.0  # there is nothing left to give up
        self._blocks = None
        return orphans[heirs >= 0], heirs[heirs >= 0]

    def keep(self, earlier: Positions, later: Positions) -> None:
        """Twins of tokens that have been given up already, found too late.

        Where nothing stands for such a token yet, its twin does from now on.

        Args:
            earlier: ``[N]`` tokens of re-pointed blocks, each at most once.
            later: ``[N]`` their twins, in blocks that are there.
        """
        alone = self._twins[earlier] < 0
        self._twins[earlier[alone]] = later[alone]
        self._needed[later[alone]] = True
        self._blocks = None

    @property
    def best(self) -> tuple[Positions, npt.NDArray[np.float32]]:
        """Each token's twin, -1 if it has none, and how similar it is."""
        return self._twins, self._similarity

    @property
    def coverage(self) -> npt.NDArray[np.float32]:
        """``[blocks]``: mean similarity of the least covered quarter of each block's tokens."""
        return self._by_block().coverage

    @property
    def last_copies(self) -> npt.NDArray[np.bool_]:
        """``[blocks]``: whether something that was given up elsewhere survives only there."""
        return self._by_block().last_copies

    def _by_block(self) -> _BlockView:
        if self._blocks is None:
            size = self._block_size
            whole = len(self._twins) // size * size
            quarter = max(size // 4, 1)
            slots = self._similarity[:whole].reshape(-1, size)
            worst = np.partition(slots, quarter - 1, axis=1)[:, :quarter]
            alone = self._needed[:whole] & (self._twins[:whole] < 0)
            last_copies = np.logical_or.reduce(alone.reshape(-1, size), axis=1)
            self._blocks = _BlockView(worst.mean(axis=1), last_copies)
        return self._blocks


class _BlockView(NamedTuple):
    coverage: npt.NDArray[np.float32]
    last_copies: npt.NDArray[np.bool_]


class _Pairs(NamedTuple):
    """Pairs of tokens of one request."""

    state: RequestState
    generation: int
    earlier: Positions
    later: Positions


class Survey:
    """:class:`~memshare.engine.desk.StageTwoDesk` of the policy ``twins``."""

    def __init__(
        self,
        config: DistanceConfig,
        roster: Roster,
        book: BlockBook,
        journal: Journal,
        world_size: int,
    ) -> None:
        self._per_step = config.max_jobs_per_step * book.block_size
        self._max_waiting = config.max_waiting * book.block_size
        self._roster = roster
        self._book = book
        self._journal = journal
        self._gather = RankGather(world_size)
        self._maps: dict[str, TwinMap] = {}
        self._waiting: deque[_Pairs] = deque()
        self._waiting_pairs = 0
        self._running: dict[int, list[_Pairs]] = {}
        self._last_id = 0

    def __len__(self) -> int:
        """See :meth:`StageTwoDesk.__len__`."""
        return self._waiting_pairs

    @property
    def running(self) -> int:
        """See :attr:`StageTwoDesk.running`."""
        return sum(len(pairs.earlier) for job in self._running.values() for pairs in job)

    def map_of(self, state: RequestState) -> TwinMap:
        """What is known of the request's tokens, with room for its full blocks."""
        known = self._maps.get(state.request_id)
        if known is None:
            known = self._maps[state.request_id] = TwinMap(self._book.block_size)
        known.grow(state.full)
        return known

    def propose(self, answer: Answer) -> None:
        """See :meth:`StageTwoDesk.propose`."""
        for links in answer.links:
            self._journal.tally.add("candidates", len(links.earlier))
            self._add_links(links)

    def grown(self, state: RequestState) -> None:
        """See :meth:`StageTwoDesk.grown`. A block leaves the recent window, and may go from now on:
        its distance is observed."""
        index = self._roster.end_target(state) - 1
        if index >= self._roster.first_target(state):
            coverage = self.map_of(state).coverage[index]
            self._journal.tally.observe_distance(1.0 - float(coverage))

    def given_up(self, state: RequestState, index: int) -> None:
        """Block ``index`` of the request has been re-pointed."""
        orphans, heirs = self.map_of(state).give_up(index)
        own = self._are_own(state, orphans, heirs)
        self._journal.tally.add("candidates", int(own.sum()))
        self._add(_Pairs(state, state.generation, orphans[own], heirs[own]))

    def forget(self, state: RequestState) -> None:
        """See :meth:`StageTwoDesk.forget`. What waits is found stale in its turn."""
        self._maps.pop(state.request_id, None)

    def take(self) -> tuple[TwinBatch, ...]:
        """See :meth:`StageTwoDesk.take`."""
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
        """See :meth:`StageTwoDesk.receive`."""
        for job_id, result in self._gather.complete(results):
            similarity = np.array(result.totals, np.float32) / np.float32(max(result.count, 1))
            start = 0
            for pairs in self._running.pop(job_id):
                end = start + len(pairs.earlier)
                self._learn(pairs, similarity[start:end])
                start = end

    def _learn(self, pairs: _Pairs, similarity: npt.NDArray[np.float32]) -> None:
        tally, similar = self._journal.tally, int((similarity > 0).sum())
        tally.add("compared", len(similarity))
        tally.add("verified", similar)
        tally.add("rejected", len(similarity) - similar)
        if not self._is_current(pairs):
            return
        own = self._are_own(pairs.state, pairs.earlier, pairs.later)
        self.map_of(pairs.state).learn(pairs.earlier[own], pairs.later[own], similarity[own])
        if not own.all():
            self._keep(pairs, own)
        self._journal.event(
            "compared", request=pairs.state.request_id, tokens=len(similarity), similar=similar
        )

    def _add_links(self, links: TwinLinks) -> None:
        state = self._roster.get(links.request_id)
        if state is None or state.generation != links.generation:
            self._drop(len(links.earlier), "unknown_request")
            return
        first = self._roster.first_target(state) * self._book.block_size
        begin = int(np.searchsorted(links.earlier, first))
        self._drop(begin, "protected")
        earlier, later = links.earlier[begin:], links.later[begin:]
        # A twin in the same block would go together with its token.
        apart = earlier // self._book.block_size != later // self._book.block_size
        self._drop(int((~apart).sum()), "no_gain")
        earlier, later = earlier[apart], later[apart]
        if len(later) and int(later.max()) >= state.full * self._book.block_size:
            self._drop(len(later), "unavailable")  # not written yet: an answer that can't be right
            return
        self._add(_Pairs(state, state.generation, earlier, later))

    def _add(self, pairs: _Pairs) -> None:
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
            self.map_of(pairs.state).keep(pairs.earlier[late], pairs.later[late])

    def _are_own(self, state: RequestState, *ends: Positions) -> npt.NDArray[np.bool_]:
        """``[N]``: whether neither end of each pair lies in a re-pointed entry."""
        repointed = np.zeros(state.full + 1, np.bool_)
        repointed[list(state.repointed)] = True
        gone: npt.NDArray[np.bool_] = np.logical_or.reduce(
            [repointed[positions // self._book.block_size] for positions in ends]
        )
        return ~gone

    def _is_current(self, pairs: _Pairs) -> bool:
        state = pairs.state
        return (
            state.alive
            and state.generation == pairs.generation
            and self._book.table(state.request_id) is not None
        )

    def _at(self, pairs: _Pairs) -> npt.NDArray[np.int64]:
        """``[4, N]``, as in :class:`TwinBatch`."""
        table = self._book.table(pairs.state.request_id)
        assert table is not None, "looked at by the caller"
        rows = []
        for positions in (pairs.earlier, pairs.later):
            indices = (positions // self._book.block_size).tolist()
            blocks = np.fromiter((table[i].block_id for i in indices), np.int64, len(indices))
            rows += [blocks, positions.astype(np.int64)]
        return np.stack(rows)

    def _drop(self, pairs: int, reason: DropReason) -> None:
        if pairs:
            self._journal.tally.add_labelled("dropped", reason, pairs)
