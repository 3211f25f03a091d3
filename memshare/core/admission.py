"""Hold waiting requests back while running ones cannot be sure of their next blocks.

vLLM admits a waiting request as soon as its prompt fits. Requests admitted together also grow
together. Reclaiming cannot undo that: a request can give up only a fraction of what it has written,
and one that has just begun has written nothing. So after a preemption MemShare raises vLLM's own
watermark, the number of blocks that an admission must leave free
(vllm/v1/core/kv_cache_manager.py, ``allocate_slots``), to what running requests will soon need.
"""

from __future__ import annotations

from memshare.config import AdmissionConfig
from memshare.core.interfaces import BlockTables
from memshare.core.reclaimer import Reclaimer
from memshare.core.request_tracker import RequestTracker
from memshare.core.requests import RequestState


class Admission:
    """Keeps the watermark. Costs next to nothing until vLLM preempts.

    Only requests that MemShare follows are foreseen; those that opted out grow unnoticed.
    """

    def __init__(
        self,
        config: AdmissionConfig,
        tracker: RequestTracker,
        reclaimer: Reclaimer,
        tables: BlockTables,
    ) -> None:
        self._lookahead = config.lookahead_tokens
        self._hold_steps = config.hold_steps
        self._tracker = tracker
        self._reclaimer = reclaimer
        self._tables = tables
        self._holding = 0  # engine steps for which admission is still held back
        self._growth: dict[str, int] = {}  # blocks, by request that holds any; empty if not holding
        self._total = 0  # of the above

    @property
    def reserve(self) -> int:
        """Blocks that an admission must leave free now; 0 while vLLM admits as it likes."""
        if not self._holding:
            return 0
        return min(max(0, self._total - self._reclaimer.reclaimable), self._tables.total)

    def admitted(self, state: RequestState) -> None:
        """vLLM has just admitted the request: the next admission, perhaps in the same step, has to
        leave room for its growth too."""
        if self._holding:
            self.grown(state)
            self._tables.keep_free(self.reserve)

    def grown(self, state: RequestState) -> None:
        """The request has filled a block: look ahead again."""
        if not self._holding:
            return
        request, table = state.request, self._tables.table(state.request_id)
        if table is None:
            return
        written = request.num_tokens
        left = request.num_prompt_tokens + request.max_tokens - written
        ahead = max(0, min(left, self._lookahead))
        growth = self._reclaimer.footprint(state, written + ahead) - len(table)
        self._total += growth - self._growth.get(state.request_id, 0)
        self._growth[state.request_id] = growth

    def discount(self, state: RequestState) -> None:
        """The request's blocks are gone, or about to go."""
        self._total -= self._growth.pop(state.request_id, 0)

    def close(self) -> None:
        """Admit no request during the step that is being scheduled."""
        self._tables.keep_free(self._tables.total)

    def advance(self, preempted: bool) -> None:
        """A step has been scheduled; what is decided now is for the next one.

        Args:
            preempted: whether vLLM had to preempt, so that too much has been admitted.
        """
        if preempted and self._lookahead and self._reclaimer.enabled:
            begins = not self._holding
            self._holding = self._hold_steps
            if begins:
                for state in self._tracker:
                    self.grown(state)
        elif self._holding:
            self._holding -= 1
            if not self._holding:
                self._growth.clear()
                self._total = 0
        self._tables.keep_free(self.reserve)
