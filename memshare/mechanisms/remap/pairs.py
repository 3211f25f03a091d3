"""A pair of table entries on its way to a remap: target and donor."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from memshare.core.interfaces import Block, BlockTables
from memshare.core.request_tracker import RequestTracker
from memshare.core.requests import RequestState
from memshare.telemetry.event_log import EventKind, EventValue
from memshare.telemetry.explain import Cause
from memshare.telemetry.recorder import Recorder
from memshare.telemetry.stats import DropReason, RemapNote


@dataclass(frozen=True, eq=False, slots=True)
class Entry:
    """A table entry as it was when a pair was proposed; validated by object identity later."""

    state: RequestState
    generation: int
    index: int
    block: Block

    def is_current(self, table: Sequence[Block] | None) -> bool:
        """Whether the entry still is what it was: nothing in between moved or freed the block."""
        return (
            self.state.alive
            and self.state.generation == self.generation
            and table is not None
            and self.index < len(table)
            and table[self.index] is self.block
        )


@dataclass(eq=False, slots=True)
class Candidate:
    """A (target, donor) pair on its way from stage one to a remap."""

    target: Entry
    donor: Entry
    damage: float = 1.0

    @property
    def target_key(self) -> tuple[str, int, int]:
        """Request, generation and index of the target."""
        target = self.target
        return (target.state.request_id, target.generation, target.index)

    def is_current(self, tables: BlockTables) -> bool:
        """Whether both blocks still are what they were when the pair was proposed."""
        return all(
            entry.is_current(tables.table(entry.state.request_id))
            for entry in (self.target, self.donor)
        )


def own_entry(
    tracker: RequestTracker, tables: BlockTables, request_id: str, generation: int, index: int
) -> Entry | None:
    """A table entry as it is now; None if it holds no full block of its own.

    A re-pointed entry is neither target nor donor: its block holds another position's KV.
    """
    state = tracker.get(request_id)
    if state is None or state.generation != generation or index >= state.full:
        return None
    if index in state.repointed:
        return None
    table = tables.table(state.request_id)
    if table is None or index >= len(table):
        return None
    return Entry(state, state.generation, index, table[index])


class PairRecorder:
    """Counts, explains and logs what becomes of pairs."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def transition(self, kind: EventKind, pair: Candidate, **fields: EventValue) -> None:
        """Log a transition of a pair."""
        if self._recorder.logs_events:
            target, donor = pair.target, pair.donor
            self._recorder.event(
                kind, request=target.state.request_id, target=target.index,
                target_block=target.block.block_id, donor_request=donor.state.request_id,
                donor=donor.index, donor_block=donor.block.block_id, **fields,
            )  # fmt: skip

    def dropped(self, pair: Candidate, reason: DropReason) -> None:
        """A pair will not be applied."""
        self._recorder.counters.add_labelled("dropped", reason)
        self.transition("dropped", pair, reason=reason)

    def applied(self, pair: Candidate, freed: int, cause: Cause, moved: int) -> None:
        """A remap has been applied, has freed so many blocks and moved so many earlier sharers."""
        target, donor = pair.target, pair.donor
        request = target.state.request_id
        counters = self._recorder.counters
        counters.add("applied")
        counters.add("blocks_reclaimed", freed)
        counters.note_remap(
            RemapNote(time.time(), request, target.index, donor.state.request_id, donor.index)
        )
        self._recorder.explainer.reclaimed(request, freed, cause)
        self.transition("applied", pair, damage=round(pair.damage, 4), freed=freed, moved=moved)
