"""The act: an entry is pointed at its donor, and the engine's books stay right."""

from __future__ import annotations

from collections.abc import Iterator

from memshare.core.interfaces import BlockTables
from memshare.core.request_tracker import RequestTracker
from memshare.core.requests import RequestState
from memshare.mechanisms.remap.messages import Remap
from memshare.mechanisms.remap.pairs import Candidate, PairRecorder
from memshare.telemetry.explain import Cause


class Remapper:
    """Applies remaps.

    Attributes:
        shared_entries: table entries of live requests that are re-pointed now.
    """

    def __init__(
        self, tables: BlockTables, tracker: RequestTracker, recorder: PairRecorder
    ) -> None:
        self.shared_entries = 0
        self._tables = tables
        self._tracker = tracker
        self._recorder = recorder
        self._remaps: list[Remap] = []  # of the step that is being scheduled

    def apply(self, pair: Candidate, cause: Cause) -> int:
        """Do a remap: scheduler's table, reference counts, workers' command; returns blocks freed.

        Entries that share the target's block go with it, so that a donor is not kept for them.
        """
        state, index, donor = pair.target.state, pair.target.index, pair.donor.block
        entries = [index, *state.sharers.pop(pair.target.block.block_id, ())]
        if state.tainted_from is None:
            state.tainted_from = state.full
            self._tables.stop_publishing(state.request_id)
        state.note_held(self._tables.entries(state.request_id))
        freed = sum(self._tables.repoint(state.request_id, entry, donor) for entry in entries)
        self._remaps += [Remap(state.request_id, entry, donor.block_id) for entry in entries]
        state.sharers.setdefault(donor.block_id, []).extend(entries)
        state.repointed.add(index)
        state.given_up += 1
        self.shared_entries += 1
        self._recorder.applied(pair, freed, cause, moved=len(entries) - 1)
        return freed

    def take_remaps(self) -> tuple[Remap, ...]:
        """The commands that go to the workers with this step."""
        remaps, self._remaps = tuple(self._remaps), []
        return remaps

    def forget_request(self, state: RequestState) -> None:
        """The request's blocks are gone, or about to go."""
        self.shared_entries -= len(state.repointed)
        # Its row in the workers is gone; V2 may give it to another request in this very step.
        self._remaps = [r for r in self._remaps if r.request_id != state.request_id]

    def faults(self) -> Iterator[str]:
        """What is wrong with re-pointed entries."""
        for state in self._tracker:
            name, table = f"request {state.request_id}", self._tables.table(state.request_id)
            if table is None:
                continue
            if state.repointed and state.tainted_from is None:
                yield f"{name}: remapped, but not tainted"
            if state.repointed and max(state.repointed) >= len(table):
                yield f"{name}: a remapped entry is gone"
            elif not state.sharers_are_right(table):
                yield f"{name}: a remapped entry points elsewhere than is noted"
        shared = sum(len(state.repointed) for state in self._tracker)
        if shared != self.shared_entries:
            yield f"{self.shared_entries} shared entries counted, {shared} held"
