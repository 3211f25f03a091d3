"""The scheduler part of the policy ``paper``: verified pairs wait in the reclaim queue."""

from __future__ import annotations

from memshare.core.reclaim_queue import ReclaimQueue
from memshare.core.requests import RequestState
from memshare.mechanisms.contract import SchedulerContext
from memshare.mechanisms.remap.pairs import Candidate
from memshare.mechanisms.remap.scheduler import RemapPart, Stages
from memshare.mechanisms.remap.view import TableView
from memshare.mechanisms.step_pairs.policy import PairProposer
from memshare.mechanisms.step_pairs.verifier import BlockPairVerifier
from memshare.search.step_feeder import StepFeeder
from memshare.telemetry.explain import Cause
from memshare.telemetry.stats import DropReason


class StepPairsPart(RemapPart):
    """Holds verified pairs until their blocks are wanted."""

    def __init__(self, context: SchedulerContext, proposer: PairProposer) -> None:
        super().__init__(context)
        self._queue: ReclaimQueue[Candidate] = ReclaimQueue()
        # Verified pairs that can't be applied yet, by request.
        self._held_back: dict[str, list[Candidate]] = {}
        self.stages = Stages(
            StepFeeder(
                context.config, context.compile_steps(), context.open_bridge(), context.recorder
            ),
            BlockPairVerifier(context, proposer, self.pairs, self.queue_verified),
        )

    def __len__(self) -> int:
        """Pairs in the reclaim queue."""
        return len(self._queue)

    @property
    def reclaimable(self) -> int:
        """Pairs in the queue, as far as budgets allow. What will be found cannot be foreseen."""
        allowed = (self._tracker.budget(state) - len(state.repointed) for state in self._tracker)
        return min(len(self._queue), sum(left for left in allowed if left > 0))

    def queue_verified(self, pair: Candidate) -> None:
        """Queue a verified pair, or hold it back until its target leaves the recent window."""
        state = pair.target.state
        if not pair.is_current(self._tables):
            self.pairs.dropped(pair, "stale")
        elif pair.target.index >= self._tracker.end_target(state):
            self._hold_back(pair)
        else:
            loser = self._queue.push(pair)
            if loser is not None:
                self.pairs.dropped(loser, "replaced")

    def on_tokens(self, state: RequestState) -> None:
        """See :meth:`SchedulerPart.on_tokens`. Looks again at what was held back."""
        super().on_tokens(state)
        for pair in self._held_back.pop(state.request_id, ()):
            self.queue_verified(pair)

    def on_gone(self, state: RequestState, reason: DropReason) -> None:
        """See :meth:`SchedulerPart.on_gone`."""
        for pair in self._held_back.pop(state.request_id, ()):
            self.pairs.dropped(pair, reason)
        for index in range(state.full):
            queued = self._queue.discard((state.request_id, state.generation, index))
            if queued is not None:
                self.pairs.dropped(queued, reason)
        super().on_gone(state, reason)

    def reclaim(self, wanted: int, cause: Cause) -> int:
        """See :meth:`SchedulerPart.reclaim`. Takes the pairs with the least damage."""
        freed = 0
        next_step: list[Candidate] = []
        while freed < wanted and (pair := self._queue.pop()) is not None:
            state = pair.target.state
            if not pair.is_current(self._tables):
                self.pairs.dropped(pair, "stale")
            elif not state.holds_alone(pair.target.block):
                self.pairs.dropped(pair, "no_gain")
            elif len(state.repointed) >= self._tracker.budget(state):
                self._hold_back(pair)  # the budget grows with the request
            elif self._tracker.must_wait(state):
                next_step.append(pair)
            else:
                freed += self.apply(pair, cause)
        for pair in next_step:
            self._queue.push(pair)
        return freed

    def obstacle(self) -> str:
        """See :meth:`SchedulerPart.obstacle`."""
        return "no pair that may be applied now waits in the reclaim queue"

    def objection(self, state: RequestState, view: TableView, index: int) -> str | None:
        """See :meth:`RemapPart.objection`."""
        del view
        key = (state.request_id, state.generation, index)
        held_back = self._held_back.get(state.request_id, ())
        if key in self._queue or any(pair.target_key == key for pair in held_back):
            return None
        return "no similar block"

    def _hold_back(self, pair: Candidate) -> None:
        self._held_back.setdefault(pair.target.state.request_id, []).append(pair)
