"""The trigger: when blocks are reclaimed, and how many. Mechanisms know which, and how."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from memshare.config import MemShareConfig
from memshare.core.interfaces import BlockTables
from memshare.core.request_tracker import RequestTracker
from memshare.core.requests import RequestState
from memshare.telemetry.explain import Cause
from memshare.telemetry.recorder import Recorder


class BlockSource(Protocol):
    """Whoever can give blocks of running requests back."""

    def reclaim(self, wanted: int, cause: Cause) -> int:
        """Free up to ``wanted`` blocks in this very step; returns how many."""
        ...

    def obstacle(self) -> str:
        """Why it can free nothing now, in words."""
        ...

    def expected_savings(self, state: RequestState, tokens: int) -> int:
        """Blocks that a request of this many tokens is expected to give up."""
        ...

    @property
    def reclaimable(self) -> int:
        """Blocks that can be freed beyond the expected savings of all requests; negative where some
        of those have been had already."""
        ...


class Reclaimer:
    """Asks for blocks: by the trigger's watermarks, ahead of demand, and before a preemption.

    Attributes:
        enabled: false in mode ``observe`` and after a failed integrity check: nothing is reclaimed.
    """

    def __init__(
        self,
        config: MemShareConfig,
        sources: Sequence[BlockSource],
        tracker: RequestTracker,
        tables: BlockTables,
        recorder: Recorder,
    ) -> None:
        self.enabled = config.mode == "share"
        self._keeps_few = config.budget.max_kept_tokens is not None
        self._eager = config.trigger.kind == "eager"
        self._low = math.ceil(config.trigger.low_watermark * tables.total)
        self._begun_together = tables.footprint.begun_together
        high = math.ceil(config.trigger.high_watermark * tables.total)
        self._high = max(high, self._begun_together)
        self._sources = sources
        self._tracker = tracker
        self._tables = tables
        self._recorder = recorder

    @property
    def reclaimable(self) -> int:
        """Blocks that can be freed beyond what :meth:`footprint` counts on; may be negative."""
        return sum(source.reclaimable for source in self._sources)

    def footprint(self, state: RequestState, tokens: int) -> int:
        """Blocks that a request of this many tokens is expected to keep."""
        savings = sum(source.expected_savings(state, tokens) for source in self._sources)
        return self._tables.footprint.blocks(tokens) - savings

    def before_preemption(self) -> bool:
        """vLLM is about to preempt for want of a block; true if reclaiming has freed one.

        Called in the middle of ``Scheduler.schedule``. The commands go out with this step's
        message, so every worker's table is edited before a freed block is written again.
        """
        freed = self._reclaim(self._high, "allocation") if self.enabled else 0
        if freed:
            self._recorder.counters.add("preemptions_avoided")
        else:
            self._recorder.explainer.in_vain(self._obstacle())
        return freed > 0

    def demand(self, entries: int) -> int:
        """Free blocks that running requests take when they begin so many entries."""
        return entries * self._begun_together

    def reclaim(self, demand: int) -> None:
        """Reclaim by the trigger, so that the next step finds its blocks.

        Args:
            demand: blocks that running requests will take in the next step.
        """
        if not self.enabled:
            return
        if self._keeps_few:
            self._reclaim(self._tables.total, "budget")
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

    def make_room(self, wanted: int) -> None:
        """Free so many blocks, or what there is, for a waiting request."""
        if self.enabled and wanted > 0:
            self._reclaim(wanted, "admission")

    def _reclaim(self, wanted: int, cause: Cause) -> int:
        """Free up to ``wanted`` blocks; returns how many."""
        freed = 0
        for source in self._sources:
            if freed < wanted:
                freed += source.reclaim(wanted - freed, cause)
        return freed

    def _obstacle(self) -> str:
        """Why nothing could be reclaimed, in words."""
        if not self.enabled:
            return "reclaiming is off (mode observe, or a failed integrity check)"
        if not any(state.full > 0 for state in self._tracker):
            return "no request that MemShare follows holds a full block"
        return "; ".join(source.obstacle() for source in self._sources)
