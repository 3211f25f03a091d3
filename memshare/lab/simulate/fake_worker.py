"""A worker that computes nothing, and notices what would have gone wrong.

It keeps block tables as model runner V1 does, "writes" KV by labelling physical blocks, and answers
stage-two jobs with random similarities; two ranks answer in different steps, as a GPU may.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from memshare.core.rank_reducer import JobResult
from memshare.core.token_map import TokenMap
from memshare.engine.messages import SchedulerMessage, WorkerMessage
from memshare.mechanisms.compaction.messages import CompactionCommands, Packing
from memshare.mechanisms.remap.messages import Batch, RemapCommands, RemapResults

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

NULL = 0
"""Id of the null block, which stands in holes."""


class _Grown(NamedTuple):
    """Entries of a table from ``start`` on are ``blocks``; ``found`` tokens of a whole table came
    out of the prefix cache."""

    request_id: str
    start: int
    blocks: list[int]
    found: int


@dataclass
class FakeWorker:
    """Block tables and block contents of a worker that computes nothing.

    Attributes:
        tables: physical block ids by request, as the worker believes them.
        written: how often each physical block has been given to a new owner and overwritten.
        expected: per request and entry, ``written`` of the block when the entry began to point to
            it; a difference means that somebody overwrote a block that is still in use.
        approximate: physical blocks that hold KV of a request that had lost something before it
            computed them, or tokens that have moved.
        faults: orders that a real worker could not have followed without harm; must stay empty.
        ranks: how many ranks answer a job.
        block_size: tokens.
        group: index of the KV cache group whose tables it keeps.
    """

    ranks: int = 1
    block_size: int = 32
    seed: int = 0
    group: int = 0
    tables: dict[str, list[int]] = field(default_factory=dict)
    written: dict[int, int] = field(default_factory=dict)
    expected: dict[str, list[int]] = field(default_factory=dict)
    approximate: set[int] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)
    late: dict[str, dict[int, JobResult]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._map = TokenMap(self.block_size)
        self._tainted: set[str] = set()  # requests that have lost something

    def execute(self, output: SchedulerOutput) -> WorkerMessage:
        """Take one step's orders: table edits first, then new and changed requests."""
        message = output.kv_connector_metadata
        assert isinstance(message, SchedulerMessage)
        results = {name: RemapResults(late) for name, late in self.late.items()}
        self.late = {}
        gone = {*output.finished_req_ids, *(output.preempted_req_ids or ())}
        holes: Mapping[str, int] = {}
        for name, commands in message.commands.items():
            if isinstance(commands, CompactionCommands):
                holes = commands.holes
                for packing in commands.packings:
                    self._pack(packing, gone)
            else:
                assert isinstance(commands, RemapCommands), "it fakes no other mechanism"
                self._remap(commands, results.setdefault(name, RemapResults()))
        for request_id in gone:
            self._forget_request(request_id)
        self._run(output, holes)
        for name, commands in message.commands.items():
            for batch in commands.batches if isinstance(commands, RemapCommands) else ():
                self._compare(name, batch, results[name])
        answer = WorkerMessage(dict(results))
        if message.tables is not None:
            answer.table_faults = [
                f"{request_id}: {self.tables[request_id]} is not {blocks}"
                for request_id, blocks in message.tables.items()
                if request_id in self.tables and self.tables[request_id] != blocks
            ]
        return answer

    def overwritten(self) -> list[str]:
        """Entries whose block was overwritten while they pointed at it. Must be empty."""
        return [
            f"{request_id}[{i}] -> {block}"
            for request_id, table in self.tables.items()
            for i, block in enumerate(table)
            if self.expected[request_id][i] != self.written.get(block, 0)
        ]

    # ---- the step ----

    def _run(self, output: SchedulerOutput, holes: Mapping[str, int]) -> None:
        """Grow the tables and "compute" the step's tokens."""
        grown = [
            _Grown(new.req_id, 0, new.block_ids[self.group], new.num_computed_tokens)
            for new in output.scheduled_new_reqs
        ]
        beside = [
            _Grown(new.req_id, 0, blocks, new.num_computed_tokens)
            for new in output.scheduled_new_reqs
            for blocks in self._of_other_groups(new.block_ids)
        ]
        computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        for i, request_id in enumerate(cached.req_ids):
            fresh = cached.new_block_ids[i]
            computed[request_id] = cached.num_computed_tokens[i]
            whole = request_id in cached.resumed_req_ids
            beside += [
                _Grown(request_id, 0, blocks, computed[request_id] if whole else 0)
                for blocks in self._of_other_groups(fresh or ())
            ]
            if whole:
                assert fresh is not None
                grown.append(_Grown(request_id, 0, fresh[self.group], computed[request_id]))
            elif fresh is not None:
                grown.append(_Grown(request_id, len(self.tables[request_id]), fresh[self.group], 0))
        # All that this step writes is written before any entry is compared: of two requests that
        # come in together, one may already use the prefix that the other one writes.
        for each in (*grown, *beside):
            self._write(each)
        for each in grown:
            self._point(each)
        for request_id, count in output.num_scheduled_tokens.items():
            if request_id in self._tainted:
                start = computed[request_id]
                touched = self._map.touched(start, start + count)
                self.approximate.update(self.tables[request_id][entry] for entry in touched)
        for each in grown:
            found = self.approximate.intersection(each.blocks[: self._map.full(each.found)])
            if found:
                self.faults.append(f"{each.request_id} has found {found}, which are approximate")
        for request_id in output.num_scheduled_tokens:
            table = self.tables[request_id]
            if table.count(NULL) != holes.get(request_id, 0):
                self.faults.append(f"{request_id}: {table.count(NULL)} holes, but told {holes}")
            if table[-1] == NULL:
                self.faults.append(f"{request_id}: its last entry is a hole")

    def _of_other_groups(self, blocks: Sequence[list[int]]) -> list[list[int]]:
        """What a request is given for layers whose tables are not kept here: they write, too."""
        return [own for group, own in enumerate(blocks) if group != self.group]

    def _write(self, grown: _Grown) -> None:
        """A new owner overwrites the blocks that begin an entry beyond what was found."""
        for i, block in enumerate(grown.blocks, grown.start):
            if block != NULL and self._map.first_position(i + 1) > grown.found:
                self.written[block] = self.written.get(block, 0) + 1
                self.approximate.discard(block)

    def _point(self, grown: _Grown) -> None:
        table = self.tables.setdefault(grown.request_id, [])
        expected = self.expected.setdefault(grown.request_id, [])
        del table[grown.start :], expected[grown.start :]
        table.extend(grown.blocks)
        expected.extend(self.written.get(block, 0) for block in grown.blocks)

    def _forget_request(self, request_id: str) -> None:
        self.tables.pop(request_id, None)
        self.expected.pop(request_id, None)
        self._tainted.discard(request_id)

    # ---- mechanisms ----

    def _remap(self, commands: RemapCommands, results: RemapResults) -> None:
        for remap in commands.remaps:
            if remap.request_id not in self.tables:
                results.misses += 1
                continue
            self.tables[remap.request_id][remap.index] = remap.block_id
            self.expected[remap.request_id][remap.index] = self.written.get(remap.block_id, 0)
            self._tainted.add(remap.request_id)

    def _pack(self, packing: Packing, gone: set[str]) -> None:
        name, table = packing.request_id, self.tables.get(packing.request_id)
        if table is None:
            self.faults.append(f"{name} is to be packed, and is not known")
            return
        if tuple(table[entry] for entry in packing.entries) != packing.blocks:
            self.faults.append(f"{name}: packing says {packing.blocks}, its table {table}")
        if NULL in packing.blocks:
            self.faults.append(f"{name}: a hole is to be packed")
        kept, dropped = packing.entries[: packing.keep], packing.entries[packing.keep :]
        for entry in kept:
            others = [
                other
                for other, blocks in self.tables.items()
                if other not in {name, *gone} and table[entry] in blocks
            ]
            if others:
                self.faults.append(f"{name}: tokens move into a block of {others}")
            self.approximate.add(table[entry])
        for entry in dropped:
            table[entry] = NULL
            self.expected[name][entry] = self.written.get(NULL, 0)
        self._tainted.add(name)

    def _compare(self, name: str, batch: Batch, results: RemapResults) -> None:
        """Answer a batch's jobs with random similarities, those of other ranks in the next step."""
        for job_id, pairs in batch.pairs_by_job().items():
            shares = [self._random.random() for _ in range(pairs)]
            results.results[job_id] = JobResult(list(shares), 1, 1)
            if self.ranks > 1:
                late = self.late.setdefault(name, {})
                late[job_id] = JobResult(list(shares), 1, self.ranks - 1)
