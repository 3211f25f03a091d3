"""The act: which remaps are done, when, and how vLLM's books stay right."""

from __future__ import annotations

import heapq
import math

import numpy as np
import numpy.typing as npt

from memshare.config import MemShareConfig
from memshare.core.reclaim_queue import ReclaimQueue
from memshare.core.request_tracker import RequestTracker
from memshare.core.requests import Candidate, Entry, RequestState
from memshare.engine.messages import Remap
from memshare.engine.vllm_0_32.block_tables import BlockTables
from memshare.mechanisms.remap.policy import DemandPolicy, StagedPolicy, Victim
from memshare.mechanisms.twins.verifier import TokenPairVerifier
from memshare.telemetry.explain import Cause
from memshare.telemetry.recorder import Recorder
from memshare.telemetry.stats import DropReason


class Reclaimer:
    """Holds verified pairs and applies remaps.

    Attributes:
        enabled: false in mode ``observe`` and after a failed integrity check: nothing is remapped.
        shared_entries: table entries of live requests that are re-pointed now.
    """

    def __init__(
        self,
        config: MemShareConfig,
        policy: StagedPolicy | DemandPolicy,
        tracker: RequestTracker,
        tables: BlockTables,
        survey: TokenPairVerifier | None,
        recorder: Recorder,
    ) -> None:
        self.enabled = config.mode == "share"
        self.shared_entries = 0
        self._eager = config.trigger.kind == "eager"
        self._low = math.ceil(config.trigger.low_watermark * tables.total)
        self._high = max(math.ceil(config.trigger.high_watermark * tables.total), 1)
        self._policy = policy
        self._tracker = tracker
        self._tables = tables
        self._survey = survey
        self._recorder = recorder
        self._queue: ReclaimQueue[Candidate] = ReclaimQueue()
        self._remaps: list[Remap] = []  # of the step that is being scheduled

    def __len__(self) -> int:
        """Pairs in the reclaim queue."""
        return len(self._queue)

    @property
    def reclaimable(self) -> int:
        """Blocks that can be freed beyond what :meth:`footprint` counts on; may be negative.

        On demand, a footprint counts on the whole budget, of which some has been used already.
        """
        if not isinstance(self._policy, StagedPolicy):
            return -self.shared_entries
        allowed = (self._tracker.budget(state) - len(state.repointed) for state in self._tracker)
        return min(len(self._queue), sum(left for left in allowed if left > 0))

    def footprint(self, state: RequestState, tokens: int) -> int:
        """Blocks that a request of so many tokens is expected to keep.

        All that it may re-point on demand is left out, though a policy may keep some of that. Pairs
        of a staged policy cannot be foreseen.
        """
        blocks = self._tables.token_map.entries(tokens)
        if isinstance(self._policy, StagedPolicy):
            return blocks
        return blocks - self._tracker.shareable(state, self._tables.token_map.full(tokens))

    def view(self, state: RequestState) -> TableView:
        """The request's blocks as an on-demand policy sees them; it must hold some."""
        return TableView(self._tracker, self._tables, self._survey, state)

    def has_pair(self, state: RequestState, index: int) -> bool:
        """Whether a verified pair whose target is that entry waits, or is held back."""
        key = (state.request_id, state.generation, index)
        return key in self._queue or any(pair.target_key == key for pair in state.held_back)

    def add(self, candidate: Candidate) -> None:
        """Queue a verified pair, or hold it back until its target leaves the recent window."""
        state = candidate.target.state
        if not self._tracker.is_current(candidate):
            self._recorder.drop(candidate, "stale")
        elif candidate.target.index >= self._tracker.end_target(state):
            state.held_back.append(candidate)
        else:
            loser = self._queue.push(candidate)
            if loser is not None:
                self._recorder.drop(loser, "replaced")

    def release(self, state: RequestState) -> None:
        """The request has grown by a block: look again at what was held back."""
        held_back, state.held_back = state.held_back, []
        for candidate in held_back:
            self.add(candidate)

    def forget(self, state: RequestState, reason: DropReason) -> None:
        """The request's blocks are gone, or about to go."""
        self.shared_entries -= len(state.repointed)
        for candidate in state.held_back:
            self._recorder.drop(candidate, reason)
        for index in range(state.full):
            queued = self._queue.discard((state.request_id, state.generation, index))
            if queued is not None:
                self._recorder.drop(queued, reason)
        # Its row in the workers is gone; V2 may give it to another request in this very step.
        self._remaps = [r for r in self._remaps if r.request_id != state.request_id]

    def take_remaps(self) -> tuple[Remap, ...]:
        """The commands that go to the workers with this step."""
        remaps, self._remaps = tuple(self._remaps), []
        return remaps

    def before_preemption(self) -> bool:
        """vLLM is about to preempt for want of a block; true if reclaiming has freed one.

        Called in the middle of ``Scheduler.schedule``. The remaps go out with this step's message,
        so every worker's table is edited before a freed block is written again.
        """
        freed = self._reclaim(self._high, "allocation") if self.enabled else 0
        if freed:
            self._recorder.counters.add("preemptions_avoided")
        else:
            self._recorder.explainer.in_vain(self._obstacle())
        return freed > 0

    def reclaim(self, demand: int) -> None:
        """Reclaim by the trigger, so that the next step finds its blocks.

        Args:
            demand: blocks that running requests will begin in the next step.
        """
        if not self.enabled:
            return
        if self._eager:
            self._reclaim(self._tables.total, "eager")
            return
        free = self._tables.free
        if free >= max(self._low, demand):
            return
        cause: Cause = "demand" if free < demand else "watermark"
        freed = self._reclaim(self._high + demand - free, cause)
        if free < demand <= free + freed:
            self._recorder.counters.add("preemptions_avoided")

    def _reclaim(self, wanted: int, cause: Cause) -> int:
        """Free up to ``wanted`` blocks; returns how many."""
        if isinstance(self._policy, StagedPolicy):
            return self._reclaim_queued(wanted, cause)
        return self._reclaim_on_demand(self._policy, wanted, cause)

    def _obstacle(self) -> str:
        """Why nothing could be reclaimed, in words."""
        if not self.enabled:
            return "remaps are off (mode observe, or a failed integrity check)"
        holders = [state for state in self._tracker if state.full > 0]
        if not holders:
            return "no request that MemShare follows holds a full block"
        if isinstance(self._policy, StagedPolicy):
            return "no pair that may be applied now waits in the reclaim queue"
        if all(self._must_wait(state) for state in holders):
            return "every request that holds blocks has to wait for another step"
        return "every request has used up its budget or has no block left that may go"

    def _reclaim_queued(self, wanted: int, cause: Cause) -> int:
        freed = 0
        next_step: list[Candidate] = []
        while freed < wanted and (candidate := self._queue.pop()) is not None:
            state = candidate.target.state
            if not self._tracker.is_current(candidate):
                self._recorder.drop(candidate, "stale")
            elif not state.holds_alone(candidate.target.block):
                self._recorder.drop(candidate, "no_gain")
            elif len(state.repointed) >= self._tracker.budget(state):
                state.held_back.append(candidate)  # the budget grows with the request
            elif self._must_wait(state):
                next_step.append(candidate)
            else:
                freed += self._apply(candidate, cause)
        for candidate in next_step:
            self._queue.push(candidate)
        return freed

    def _reclaim_on_demand(self, policy: DemandPolicy, wanted: int, cause: Cause) -> int:
        """Take the best victims of all requests; the least shared go first among equals.

        The less of a request is re-pointed and the better its best victim, the earlier its turn.
        How good that is, a policy can tell cheaply only as a promise: a victim that turns out worse
        than another request's promise goes back into the heap.
        """
        views = [
            self.view(state)
            for state in self._tracker
            if state.full > 0 and not self._must_wait(state)
        ]
        heap = [
            (view.shared_fraction - policy.promise(view), i)
            for i, view in enumerate(views)
            if view.has_budget
        ]
        heapq.heapify(heap)
        chosen: dict[int, Victim] = {}
        freed = 0
        while heap and freed < wanted:
            _, i = heapq.heappop(heap)
            view = views[i]
            victim = chosen.pop(i, None) or policy.choose(view)
            if victim is None:
                continue
            turn = view.shared_fraction - victim.quality
            if heap and turn > heap[0][0]:
                chosen[i] = victim
                heapq.heappush(heap, (turn, i))
                continue
            freed += self._apply(view.candidate(victim.target, victim.donor), cause)
            if view.has_budget:
                heapq.heappush(heap, (view.shared_fraction - policy.promise(view), i))
        return freed

    def _must_wait(self, state: RequestState) -> bool:
        """Whether a remap of this request must wait for another step.

        Either its whole block list is on its way to the workers and would overwrite the edit, or it
        would be its first remap in a step that publishes a block (see BlockTables.publishes_soon).
        """
        if (
            state.sent_whole_at == self._recorder.step
            or self._tables.table(state.request_id) is None
        ):
            return True
        return state.tainted_from is None and self._tables.publishes_soon(state.request)

    def _apply(self, candidate: Candidate, cause: Cause) -> int:
        """The remap: scheduler's table, reference counts and the workers' command. Blocks freed.

        Entries that share the target's block go with it, so that a donor is not kept for them.
        """
        state, index, donor = candidate.target.state, candidate.target.index, candidate.donor.block
        entries = [index, *state.sharers.pop(candidate.target.block.block_id, ())]
        if state.tainted_from is None:
            state.tainted_from = state.full
            self._tables.stop_publishing(state.request_id)
        state.note_held(self._tables.entries(state.request_id))
        freed = sum(self._tables.repoint(state.request_id, entry, donor) for entry in entries)
        self._remaps += [Remap(state.request_id, entry, donor.block_id) for entry in entries]
        state.sharers.setdefault(donor.block_id, []).extend(entries)
        state.repointed.add(index)
        state.given_up += 1
        if self._survey is not None:
            self._survey.given_up(state, index)
        self.shared_entries += 1
        self._recorder.remapped(candidate, freed, cause, moved=len(entries) - 1)
        return freed


class TableView:
    """One request as an on-demand policy sees it: a :class:`.RequestView` of its block table."""

    __slots__ = ("_blocks", "_copies", "_state", "budget", "end", "first", "full")

    def __init__(
        self,
        tracker: RequestTracker,
        tables: BlockTables,
        survey: TokenPairVerifier | None,
        state: RequestState,
    ) -> None:
        table = tables.table(state.request_id)
        assert table is not None, "the caller has looked"
        self._blocks = table
        self._state = state
        self._copies = survey.copies_of(state) if survey is not None else None
        self.first = tracker.first_target(state)
        self.end = min(tracker.end_target(state), len(table))
        self.full = min(state.full, len(table))
        self.budget = tracker.budget(state)

    @property
    def has_budget(self) -> bool:
        """Whether another block of the request may be re-pointed."""
        return len(self._state.repointed) < self.budget and self.first < self.end

    @property
    def shared_fraction(self) -> float:
        """How much of the request is re-pointed."""
        return len(self._state.repointed) / self.full

    def is_target(self, index: int) -> bool:
        """See :meth:`RequestView.is_target`."""
        if not self.is_own(index) or not self.is_alone(index):
            return False
        return self._copies is None or not self._copies.last_copies[index]

    def is_own(self, index: int) -> bool:
        """See :meth:`RequestView.is_own`."""
        return index not in self._state.repointed

    def is_alone(self, index: int) -> bool:
        """Whether no other request's table holds the entry's block."""
        return self._state.holds_alone(self._blocks[index])

    def sharers(self, index: int) -> int:
        """See :meth:`RequestView.sharers`."""
        return int(self._blocks[index].ref_cnt) - 1

    @property
    def coverage(self) -> npt.NDArray[np.float32]:
        """See :attr:`RequestView.coverage`."""
        if self._copies is None:
            return np.zeros(self.full, np.float32)
        return self._copies.coverage[: self.full]

    @property
    def block_threshold(self) -> float | None:
        """See :attr:`RequestView.block_threshold`."""
        return self._state.options.memshare_block_threshold

    def candidate(self, target: int, donor: int) -> Candidate:
        """The pair that a policy's choice means."""
        state, blocks = self._state, self._blocks
        return Candidate(
            Entry(state, state.generation, target, blocks[target]),
            Entry(state, state.generation, donor, blocks[donor]),
        )
