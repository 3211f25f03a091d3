"""Remaps on demand: a policy picks a victim at the moment when a block is needed."""

from __future__ import annotations

import heapq

from memshare.core.requests import RequestState
from memshare.mechanisms.contract import SchedulerContext
from memshare.mechanisms.remap.policy import DemandPolicy, Victim
from memshare.mechanisms.remap.scheduler import RemapPart, Stages
from memshare.mechanisms.remap.view import TableView
from memshare.telemetry.explain import Cause


class OnDemandPart(RemapPart):
    """Takes the best victims of all requests, by a policy."""

    def __init__(
        self, context: SchedulerContext, policy: DemandPolicy, stages: Stages | None = None
    ) -> None:
        super().__init__(context, stages)
        self._policy = policy

    @property
    def reclaimable(self) -> int:
        """Expected savings are the whole budget, of which some has been used already."""
        return -self.remapper.shared_entries

    def expected_savings(self, state: RequestState, tokens: int) -> int:
        """All that the request may re-point, though a policy may keep some of that."""
        return self._tracker.shareable(state, self._tables.token_map.full(tokens))

    def obstacle(self) -> str:
        """See :meth:`SchedulerPart.obstacle`."""
        if all(self._tracker.must_wait(state) for state in self._tracker if state.full > 0):
            return "every request that holds blocks has to wait for another step"
        return "every request has used up its budget or has no block left that may go"

    def objection(self, state: RequestState, view: TableView, index: int) -> str | None:
        """See :meth:`RemapPart.objection`."""
        return self._policy.objection(view, index)

    def reclaim(self, wanted: int, cause: Cause) -> int:
        """Take the best victims of all requests; the least shared go first among equals.

        The less of a request is re-pointed and the better its best victim, the earlier its turn.
        How good that is, a policy can tell cheaply only as a promise: a victim that turns out worse
        than another request's promise goes back into the heap.
        """
        policy = self._policy
        views = [
            self.view(state)
            for state in self._tracker
            if state.full > 0 and not self._tracker.must_wait(state)
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
            freed += self.apply(view.candidate(victim.target, victim.donor), cause)
            if view.has_budget:
                heapq.heappush(heap, (view.shared_fraction - policy.promise(view), i))
        return freed
