"""Packing, by any sequence of rounds, on caches as a backend arranges them.

Every token's K and V say which token it is, in which layer and head, so after each round all slots
can be read back and compared with what a plain Python model says must be there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from memshare.core.token_map import TokenMap
from memshare.kv import layout as kv_layout
from memshare.mechanisms.compaction import worker as worker_module
from memshare.mechanisms.compaction.messages import (
    CompactionCommands,
    CompactionReport,
    Packing,
)
from memshare.mechanisms.compaction.packing import move_along, plan_moves
from memshare.mechanisms.compaction.stopwatch import Stopwatch
from memshare.mechanisms.compaction.worker import CompactionWorkerPart
from memshare.mechanisms.contract import WorkerContext

LAYERS, HEADS, SLOTS, CHANNELS = 2, 3, 4, 4
BLOCKS, ENTRIES = 24, 12
NAME = "request"


class PlainLayer:
    """A layer whose backend stores K beside V."""

    head_size = CHANNELS
    dtype = torch.float32
    cache_dtype = "auto"
    scales = (1.0, 1.0)
    rotary = None

    def write(
        self, keys: torch.Tensor, values: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor
    ) -> None:
        size = cache.shape[2]
        cache[slots // size, :, slots % size] = torch.cat((keys, values), -1).to(cache.dtype)


class Tables:
    """A worker's table of one request."""

    def __init__(self, blocks: list[int]) -> None:
        self.blocks = blocks

    def repoint(self, request_id: str, index: int, block_id: int) -> bool:
        if request_id != NAME:
            return False
        self.blocks[index] = block_id
        return True

    def block_ids(self, request_id: str, count: int) -> list[int] | None:
        return self.blocks[:count]


@dataclass
class View:
    seen: list[dict[str, int]] = field(default_factory=list)

    def leave_out(self, null_entries: Any) -> None:
        self.seen.append(dict(null_entries))

    def clear(self) -> None:
        pass


class Rig:
    """A worker part on real tensors, with a model of what every slot must hold."""

    def __init__(self, seed: int, arrangement: str = "tokens first") -> None:
        torch.manual_seed(seed)
        shape = (LAYERS, BLOCKS, HEADS, SLOTS, 2 * CHANNELS)
        memory = torch.zeros(shape)
        if arrangement == "tokens first":
            memory = torch.zeros(LAYERS, BLOCKS, SLOTS, HEADS, 2 * CHANNELS).transpose(2, 3)
        self.caches = list(memory)
        order = (torch.randperm(BLOCKS - 1) + 1).tolist()
        self.tables, self.view = Tables(order[:ENTRIES]), View()
        names = [f"layer.{i}" for i in range(LAYERS)]
        context = WorkerContext(
            config=None,  # type: ignore[arg-type]
            tables=self.tables,
            token_map=TokenMap(SLOTS),
            layers=dict.fromkeys(names, PlainLayer()),
            caches=dict(zip(names, self.caches, strict=True)),
            view=self.view,
        )
        params = SimpleNamespace(scorer="random", seed=seed, probe=None, position_weight=0.7)
        self.part = CompactionWorkerPart(context, params)
        # Which token each slot of each entry holds, by layer and head; None: a hole.
        self.model: list[Any] = []
        for entry in range(ENTRIES):
            first = entry * SLOTS
            self.model.append([[list(range(first, first + SLOTS))] * HEADS for _ in range(LAYERS)])
            self.write(entry, self.tables.blocks[entry])

    def write(self, entry: int, block: int) -> None:
        for layer, cache in enumerate(self.caches):
            for head in range(HEADS):
                for slot in range(SLOTS):
                    cache[block, head, slot] = mark(layer, head, entry * SLOTS + slot)

    def pack(self, entries: list[int], keep: int) -> None:
        blocks = tuple(self.tables.blocks[entry] for entry in entries)
        packing = Packing(NAME, tuple(entries), blocks, keep)
        holes = sum(block == 0 for block in self.tables.blocks) + len(entries) - keep
        self.part.before_step(CompactionCommands((packing,), {NAME: holes}))

    def held(self, entry: int, layer: int, head: int) -> list[int]:
        """The tokens under an entry's slots, as K and V tell it."""
        block = self.tables.blocks[entry]
        tokens = []
        for slot in range(SLOTS):
            row = self.caches[layer][block, head, slot]
            assert torch.equal(row, mark(layer, head, int(row[1]))), "K and V of one token"
            tokens.append(int(row[1]))
        return tokens


def mark(layer: int, head: int, token: int) -> torch.Tensor:
    """K and V of a token: both say where they come from."""
    return torch.tensor([layer * 10 + head, token, token * 3 + 1, 7.0] * 2) * torch.tensor(
        [1.0] * CHANNELS + [1.0, 2.0, 3.0, 4.0]
    )


@st.composite
def rounds(draw: st.DrawFn) -> list[tuple[float, float, int]]:
    """Rounds of packing: share of entries that take part, share of them that stay, seed."""
    share = st.floats(0, 1)
    return draw(st.lists(st.tuples(share, share, st.integers(0, 999)), min_size=1, max_size=5))


@settings(max_examples=60, deadline=None)
@given(rounds(), st.sampled_from(["tokens first", "heads first"]), st.integers(0, 2**16))
def test_after_any_rounds_every_slot_holds_a_kept_token_and_its_position_is_known(
    plan: list[tuple[float, float, int]], arrangement: str, seed: int
) -> None:
    rig = Rig(seed, arrangement)
    full = ENTRIES - 2  # the last are being written
    held = {
        (entry, layer, head): set(rig.held(entry, layer, head))
        for entry in range(ENTRIES)
        for layer in range(LAYERS)
        for head in range(HEADS)
    }
    for share, stays, order in plan:
        live = [entry for entry in range(full) if rig.tables.blocks[entry] != 0]
        if not live:
            break
        chosen = torch.randperm(len(live), generator=torch.Generator().manual_seed(order))
        entries = sorted(live[i] for i in chosen[: max(1, round(share * len(live)))].tolist())
        keep = min(round(stays * len(entries)), len(entries) - 1)
        rig.pack(entries, keep)
        assert [rig.tables.blocks[entry] == 0 for entry in entries] == [
            place >= keep for place in range(len(entries))
        ]
        for layer in range(LAYERS):
            for head in range(HEADS):
                candidates = set().union(*(held[entry, layer, head] for entry in entries))
                now = [rig.held(entry, layer, head) for entry in entries[:keep]]
                flat = [token for tokens in now for token in tokens]
                assert len(set(flat)) == keep * SLOTS, "every slot is live, no token is there twice"
                assert set(flat) <= candidates, "a layer and head keeps tokens of its own"
                for entry in entries:
                    del held[entry, layer, head]
                for entry, tokens in zip(entries[:keep], now, strict=True):
                    held[entry, layer, head] = set(tokens)
                    facts = rig.part.slots.get(NAME, entry)
                    assert facts is not None
                    assert facts.positions[layer, head].tolist() == tokens
                    assert facts.positions.dtype == torch.int32
        for entry in range(ENTRIES):  # what took no part is as it was
            if rig.tables.blocks[entry] and entry not in entries:
                assert all(
                    set(rig.held(entry, layer, head)) == held[entry, layer, head]
                    for layer in range(LAYERS)
                    for head in range(HEADS)
                )
        holes = sum(block == 0 for block in rig.tables.blocks)
        assert rig.view.seen[-1] == {NAME: holes}


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**16))
def test_what_stays_where_it_is_does_not_move(stay: int, go: int, seed: int) -> None:
    torch.manual_seed(seed)
    slots, room = (stay + go) * SLOTS, stay * SLOTS
    kept = torch.zeros(LAYERS, HEADS, slots, dtype=torch.bool)
    kept.scatter_(2, torch.rand(kept.shape).topk(room).indices, True)
    moves = plan_moves(kept, room)
    assert moves.sources.shape[2] == int(kept[..., room:].sum(-1).max()), "no move is in vain"
    after = move_along(torch.arange(slots).expand(kept.shape), moves, room)
    for layer in range(LAYERS):
        for head in range(HEADS):
            mine = kept[layer, head]
            assert sorted(after[layer, head].tolist()) == mine.nonzero()[:, 0].tolist()
            resting = mine[:room].nonzero()[:, 0]
            assert torch.equal(after[layer, head, resting], resting)


def test_the_worth_of_a_token_goes_with_it_and_is_told_once() -> None:
    rig = Rig(3)
    scored: list[list[int]] = []

    def score(keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        scored.append(positions.tolist())
        assert torch.equal(keys[0, 0, :, 1].int(), positions), "consecutive tokens, in order"
        assert torch.equal(values[1, 2, :, 1].int(), 2 * positions)
        return (keys[..., 1] * 7919 + keys[..., 0] * 31) % 101

    rig.part._scorer = SimpleNamespace(score=score)  # type: ignore[assignment]
    rig.pack([1, 2, 5, 6, 7], 3)
    assert scored == [list(range(4, 12)), list(range(20, 32))], "runs of entries"
    rig.pack([1, 2, 5, 8, 9], 2)
    assert scored[2:] == [list(range(32, 40))], "survivors keep what they were worth"
    for entry in (1, 2):
        facts = rig.part.slots.get(NAME, entry)
        assert facts is not None
        for layer in range(LAYERS):
            for head in range(HEADS):
                own = facts.positions[layer, head] * 7919 + (layer * 10 + head) * 31
                assert torch.equal(facts.worths[layer, head], (own % 101).float())


def test_much_is_scored_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        worker_module, "_SCORED_BYTES", 2 * LAYERS * HEADS * SLOTS * 2 * CHANNELS * 4
    )
    rig = Rig(4)
    scored: list[list[int]] = []

    def score(keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        scored.append(positions.tolist())
        assert torch.equal(keys[0, 0, :, 1].int(), positions)
        return keys[..., 1]

    rig.part._scorer = SimpleNamespace(score=score)  # type: ignore[assignment]
    rig.pack([3, 4, 5, 6, 7], 2)
    assert scored == [list(range(12, 20)), list(range(20, 28)), list(range(28, 32))]
    assert rig.held(3, 0, 0) + rig.held(4, 0, 0) != list(range(12, 20))


def test_dropping_all_moves_nothing_and_forgets() -> None:
    rig = Rig(5)
    rig.pack([0, 1, 2], 1)
    before = [cache.clone() for cache in rig.caches]
    rig.pack([0, 4], 0)
    assert all(torch.equal(a, b) for a, b in zip(before, rig.caches, strict=True))
    assert list(rig.part.slots.entries(NAME)) == []
    assert rig.view.seen[-1] == {NAME: 4}


def test_an_ended_request_is_forgotten_before_its_next_life_is_packed() -> None:
    rig = Rig(6)
    rig.pack([0, 1, 2], 1)
    assert NAME in rig.part.slots
    rig.tables.blocks = list(range(1, ENTRIES + 1))
    for entry in range(ENTRIES):
        rig.write(entry, entry + 1)
    packing = Packing(NAME, (0, 1, 2), (1, 2, 3), 2)
    rig.part.before_step(CompactionCommands((packing,), {NAME: 1}, ended=(NAME,)))
    facts = rig.part.slots.get(NAME, 0)
    assert facts is not None
    for layer in range(LAYERS):
        for head in range(HEADS):
            assert facts.positions[layer, head].tolist() == rig.held(0, layer, head)
    rig.part.before_step(CompactionCommands(ended=(NAME,)))
    assert NAME not in rig.part.slots


def test_a_request_without_a_table_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig(7)
    packing = Packing("unknown", (0, 1), (3, 4), 1)
    rig.part.before_step(CompactionCommands((packing,)))
    assert "unknown" in caplog.text


def test_a_cache_that_cannot_be_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PlainLayer, "write", lambda *args: None)
    with pytest.raises(worker_module.CompactionUnsupported, match=r"layer\.0.*Choose policy"):
        Rig(8)
    assert issubclass(kv_layout.LayoutUnknown, ValueError)


def test_what_took_time_is_reported_once_and_of_the_slowest_rank() -> None:
    rig = Rig(9)
    rig.part.before_step(CompactionCommands(holes={NAME: 1}))
    assert rig.part.after_step() is None, "nothing was packed"
    rig.pack([0, 1, 2], 1)
    report = rig.part.after_step()
    assert report is not None
    assert len(report.seconds) == 1
    assert report.seconds[0] > 0
    assert rig.part.after_step() is None
    report = CompactionReport([0.1, 0.4])
    report.add(CompactionReport([0.3]))
    assert report.seconds == [0.3, 0.4]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU")
def test_a_gpus_time_is_told_when_it_is_done() -> None:
    stopwatch = Stopwatch(torch.device("cuda"))
    with stopwatch.running():
        torch.cuda._sleep(10_000_000)
    torch.cuda.synchronize()
    (seconds,) = stopwatch.take()
    assert 1e-4 < seconds < 1
    assert stopwatch.take() == []
