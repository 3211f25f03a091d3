"""The scheduler part of compaction: who loses how many blocks, the books, the commands."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping

from memshare.core.requests import RequestState
from memshare.mechanisms.compaction.budget import Budgets, Room, Round, plan_rounds
from memshare.mechanisms.compaction.messages import (
    CompactionCommands,
    CompactionReport,
    Packing,
)
from memshare.mechanisms.compaction.params import CompactionParams
from memshare.mechanisms.contract import SchedulerContext, SchedulerPart
from memshare.telemetry.explain import Cause
from memshare.telemetry.stats import CompactionNote, DropReason


class CompactionPart(SchedulerPart):
    """Frees blocks in the step in which they are wanted. Which tokens go, workers find out.

    Attributes:
        holes: of every request that has some, by its id.
    """

    def __init__(self, context: SchedulerContext, params: CompactionParams) -> None:
        self.holes: dict[str, int] = {}
        self._params = params
        self._tables = context.tables
        self._tracker = context.tracker
        self._recorder = context.recorder
        self._budgets = Budgets(context.tracker, context.tables, context.config.max_thinning)
        self._packings: list[Packing] = []  # of the step that is being scheduled
        self._ended: list[str] = []  # since the last one
        self._grown: set[RequestState] = set()  # beyond the tokens that they may keep

    # ---- reclaim ----

    def reclaim(self, wanted: int, cause: Cause) -> int:
        """See :meth:`SchedulerPart.reclaim`."""
        least = self._params.min_round
        if cause == "budget":
            return self._trim(least)
        rooms = ((self._budgets.share(state), state) for state in self._ready(least))
        freed = self._run(rooms, wanted, cause, self._params.round_fraction, least)
        if freed or cause not in ("allocation", "demand", "admission"):
            return freed
        # Small rounds cost less than a preemption: the largest that there are, to their ends.
        scraps = ((-self._budgets.most_left(state), state) for state in self._ready(1))
        return self._run(scraps, wanted, cause, fraction=1.0, least=1)

    def _trim(self, least: int) -> int:
        """Compact who has grown beyond the tokens that a request may keep; who cannot be compacted
        now has its turn in the next step."""
        freed = 0
        for state in sorted(self._grown, key=lambda state: state.request_id):
            if self._budgets.excess(state) <= 0:
                self._grown.discard(state)
            elif not self._tracker.in_transit(state):
                room = self._look(state)
                each = None if room is None else self._budgets.trim(room, least)
                freed += 0 if each is None else self._compact(each, "budget")
        return freed

    def _ready(self, least: int) -> Iterator[RequestState]:
        """Requests that may have so many blocks to lose."""
        for state in self._tracker:
            if self._budgets.most_left(state) >= least and not self._tracker.in_transit(state):
                yield state

    def _run(
        self,
        rooms: Iterable[tuple[float, RequestState]],
        wanted: int,
        cause: Cause,
        fraction: float,
        least: int,
    ) -> int:
        ready = list(rooms)  # before any of them changes
        rounds = plan_rounds(ready, self._look, wanted, fraction, least)
        return sum(self._compact(each, cause) for each in rounds)

    def _look(self, state: RequestState) -> Room | None:
        """What the request may lose; None if its first loss has to wait for a step."""
        if state.tainted_from is None and not self._tables.unpublish_step(state.request):
            return None
        return self._budgets.room(state)

    def _compact(self, each: Round, cause: Cause) -> int:
        """Do a round: scheduler's table, reference counts, workers' command; returns blocks
        freed."""
        state, entries = each.room.state, each.room.entries
        request_id, table = state.request_id, self._tables.table(state.request_id)
        keep = len(entries) - each.blocks
        assert table is not None, "the round was planned in this step"
        if not self._tables.make_writable(request_id, entries[:keep]):
            return 0
        if state.tainted_from is None:
            state.tainted_from = state.full
            self._tables.stop_publishing(request_id)
        state.note_held(len(table))
        may_go = each.room.may_go
        blocks = tuple(table[entry].block_id for entry in entries)
        self._packings.append(Packing(request_id, entries, blocks, keep))
        freed = self._tables.drop_entries(request_id, entries[keep:])
        state.holes.update(entries[keep:])
        state.given_up += each.blocks
        state.dropped_tokens += (tokens := self._tables.token_map.first_position(each.blocks))
        self.holes[request_id] = len(state.holes)
        counters = self._recorder.counters
        counters.add("compactions")
        counters.add("tokens_dropped", tokens)
        counters.add("blocks_reclaimed", freed)
        first, end = entries[0], max(entries[-1], *state.holes) + 1
        counters.note_compaction(
            CompactionNote(time.time(), request_id, first, end, freed, len(state.holes))
        )
        self._recorder.explainer.reclaimed(request_id, freed, cause)
        self._recorder.event(
            "compacted", request=request_id, entries=len(entries), freed=freed, tokens=tokens,
            holes=len(state.holes), may_go=may_go, cause=cause,
        )  # fmt: skip
        return freed

    # ---- the step ----

    def commands(self) -> CompactionCommands | None:
        """See :meth:`SchedulerPart.commands`."""
        if not (self._packings or self.holes or self._ended):
            return None
        commands = CompactionCommands(tuple(self._packings), dict(self.holes), tuple(self._ended))
        self._packings, self._ended = [], []
        return commands

    def on_results(self, results: CompactionReport) -> None:
        """See :meth:`SchedulerPart.on_results`."""
        for seconds in results.seconds:
            self._recorder.counters.observe_packing(seconds)

    def on_tokens(self, state: RequestState) -> None:
        """See :meth:`SchedulerPart.on_tokens`."""
        if self._budgets.excess(state) > 0:
            self._grown.add(state)

    def on_gone(self, state: RequestState, reason: DropReason) -> None:
        """See :meth:`SchedulerPart.on_gone`."""
        request_id = state.request_id
        self._grown.discard(state)
        # Its blocks may belong to another request in this very step: nothing may be moved there.
        self._packings = [each for each in self._packings if each.request_id != request_id]
        if self.holes.pop(request_id, 0):
            self._ended.append(request_id)

    # ---- what others ask of it ----

    @property
    def reclaimable(self) -> int:
        """Expected savings are the whole budget, of which some has been used already."""
        return -sum(self.holes.values())

    def expected_savings(self, state: RequestState, tokens: int) -> int:
        """See :meth:`SchedulerPart.expected_savings`. Compaction always finds its budget."""
        return self._tracker.shareable(state, self._tables.token_map.full(tokens))

    def obstacle(self) -> str:
        """See :meth:`SchedulerPart.obstacle`."""
        if all(self._tracker.in_transit(state) for state in self._tracker if state.full > 0):
            return "every request that holds blocks has to wait for another step"
        return "every request has used up its budget or has no block left that may go"

    def gauges(self) -> Mapping[str, float]:
        """See :meth:`SchedulerPart.gauges`."""
        return {"holes": float(sum(self.holes.values()))}

    def faults(self) -> Iterator[str]:
        """See :meth:`SchedulerPart.faults`."""
        noted = {state.request_id: len(state.holes) for state in self._tracker if state.holes}
        if noted != self.holes:
            yield f"holes by request are {noted}, but {self.holes} are told to the workers"
        for state in self._tracker:
            name, table = f"request {state.request_id}", self._tables.table(state.request_id)
            if table is None:
                continue
            if state.holes and state.tainted_from is None:
                yield f"{name}: compacted, but not tainted"
            found = {entry for entry, block in enumerate(table) if block.is_null}
            if found != state.holes:
                yield f"{name}: holes {sorted(found)} in its table, {sorted(state.holes)} noted"
            if table and table[-1].is_null:
                yield f"{name}: its last entry is a hole"
