"""Hold waiting requests back while running ones cannot be sure of their next blocks.

vLLM admits a waiting request as soon as its prompt fits. Requests admitted together also grow
together, and reclaiming cannot undo that: a request can give up only a fraction of what it has
written, and one that has just begun has written nothing. So MemShare raises vLLM's own watermark,
the number of blocks that an admission must leave free (vllm/v1/core/kv_cache_manager.py,
``allocate_slots``), to what running requests will need for their next tokens.

A policy that drops tokens always finds its budget, so what it counts on is there: for it the rule
holds whenever it could matter, and what running requests can give up is reclaimed for a waiting
request that then fits. Other policies may find nothing. Holding back costs them more than it gains
until memory has proved too short, so for them the rule holds after a preemption, for a while.
"""

from __future__ import annotations

from memshare.config import MemShareConfig
from memshare.core.interfaces import BlockTables, EngineRequest
from memshare.core.reclaimer import Reclaimer
from memshare.core.request_tracker import RequestTracker
from memshare.core.requests import RequestState

# Tokens looked ahead, unless the user says otherwise (docs/experiments/scheduler.md).
_CERTAIN, _UNCERTAIN = 96, 256


class Admission:
    """Keeps the watermark. Costs next to nothing while memory is plenty.

    Only requests that MemShare follows are foreseen; those that opted out grow unnoticed.
    """

    def __init__(
        self,
        config: MemShareConfig,
        tracker: RequestTracker,
        reclaimer: Reclaimer,
        tables: BlockTables,
    ) -> None:
        asked = config.admission.lookahead_tokens
        usual = _CERTAIN if config.drops_tokens else _UNCERTAIN
        # A whole block at least: else the next one of a model with large blocks goes unseen.
        usual = max(usual, tables.token_map.first_position(1))
        self._lookahead = usual if asked is None else asked
        self._foresees = config.drops_tokens and self._lookahead > 0
        self._hold_steps = config.admission.hold_steps
        self._tracker = tracker
        self._reclaimer = reclaimer
        self._tables = tables
        # Most blocks that a request grows by in that many tokens.
        self._most_growth = tables.footprint.most_growth(self._lookahead)
        self._holding = 0  # engine steps for which admission is still held back
        self._growth: dict[str, int] = {}  # blocks, by request that holds any; empty if not holding
        self._total = 0  # of the above
        self._waiting: EngineRequest | None = None  # what vLLM could not admit in this step
        self._closed = False  # for the rest of this step

    @property
    def _holds(self) -> bool:
        return self._holding > 0 and self._reclaimer.enabled

    @property
    def reserve(self) -> int:
        """Blocks that an admission must leave free now; 0 while vLLM admits as it likes."""
        return min(max(0, self._ahead()), self._tables.total) if self._holds else 0

    def waits(self, request: EngineRequest) -> None:
        """vLLM is about to admit the request, if it fits: its own growth has to fit, too."""
        if not self._foresees or not self._reclaimer.enabled or self._closed:
            return
        if not self._holding:
            left = self._tables.free - self._tables.footprint.blocks(request.num_tokens)
            if left >= self._most_needed():
                return
            self._begin(steps=1)
        self._waiting = request
        wanted = self._ahead() + self._own_growth(request)
        self._tables.keep_free(min(max(0, wanted), self._tables.total))

    def admitted(self, state: RequestState | None) -> None:
        """vLLM has just admitted the request (None: one that is not followed). The next admission,
        perhaps in the same step, has to leave room for its growth too."""
        self._waiting = None
        if state is None:
            return
        if self._foresees and not self._holding and self._is_in_part(state):
            self._begin(steps=1)
        if self._holds:
            self.grown(state)
            self._tables.keep_free(self.reserve)

    def shortage(self, demand: int) -> int:
        """Blocks to reclaim so that the request which vLLM could not admit fits into the next step;
        0 if none waits, or if even then running ones could not be sure of their blocks.

        Args:
            demand: blocks that running requests will take in the next step.
        """
        request = self._waiting
        if request is None:
            return 0
        free, ahead = self._tables.free, self._ahead()
        if ahead >= free:
            return 0
        need = self._tables.blocks_to_admit(request)
        fits = need + self._own_growth(request) + ahead <= free
        return max(0, need + demand - free) if fits else 0

    def grown(self, state: RequestState) -> None:
        """The request has filled a block: look ahead again."""
        if not self._holds:
            return
        table = self._tables.table(state.request_id)
        if table is None:
            return
        has_room_for = self._tables.token_map.first_position(len(table))
        growth = self._footprint(state) - self._tables.footprint.blocks(has_room_for)
        self._total += growth - self._growth.get(state.request_id, 0)
        self._growth[state.request_id] = growth

    def discount(self, state: RequestState) -> None:
        """The request's blocks are gone, or about to go."""
        self._total -= self._growth.pop(state.request_id, 0)

    def close(self) -> None:
        """Admit no request during the step that is being scheduled."""
        self._closed = True
        self._tables.keep_free(self._tables.total)

    def advance(self, preempted: bool) -> None:
        """A step has been scheduled; what is decided now is for the next one.

        Args:
            preempted: whether vLLM had to preempt, so that too much has been admitted.
        """
        self._waiting, self._closed = None, False
        if self._foresees:
            if self._holding and self._is_plenty(2 * self._most_needed()):
                self._end()
        elif preempted and self._lookahead and self._reclaimer.enabled:
            self._begin(self._hold_steps)
        elif self._holding:
            self._holding -= 1
            if not self._holding:
                self._end()
        self._tables.keep_free(self.reserve)

    def _is_plenty(self, needed: int) -> bool:
        return self._tables.free > needed and self._total <= needed

    def _is_in_part(self, state: RequestState) -> bool:
        """Whether it has blocks for the first chunk of its prompt alone."""
        entries = self._tables.token_map.entries(state.request.num_tokens)
        return self._tables.entries(state.request_id) < entries

    def _most_needed(self) -> int:
        """At most so many blocks will be wanted soon, but for prompts that are computed in part."""
        return len(self._tracker) * self._most_growth

    def _begin(self, steps: int) -> None:
        begins, self._holding = not self._holding, steps
        if begins:
            for state in self._tracker:
                self.grown(state)

    def _end(self) -> None:
        self._holding = 0
        self._growth.clear()
        self._total = 0

    def _ahead(self) -> int:
        """Blocks that running requests will need, less what can be reclaimed of them."""
        return self._total - self._reclaimer.reclaimable

    def _footprint(self, state: RequestState) -> int:
        """Blocks that the request is expected to keep once it has written what we look ahead."""
        request = state.request
        left = request.num_prompt_tokens + request.max_tokens - request.num_tokens
        ahead = max(0, min(left, self._lookahead))
        return self._reclaimer.footprint(state, request.num_tokens + ahead)

    def _own_growth(self, request: EngineRequest) -> int:
        """Blocks that a waiting request will need soon, beyond those that it is admitted with."""
        state = self._tracker.get(request.request_id)
        if state is None:
            return 0
        return max(0, self._footprint(state) - self._tables.footprint.blocks(request.num_tokens))
