"""Compaction over vLLM's real scheduler, block pool and cache manager (design: 1-4, 5, 10).

Only the model is a stand-in: its worker checks every order that it is given
(memshare/lab/simulate/fake_worker.py). ``SCHEDULER_TEST_STEPS`` sets how many engine steps a run
makes (``make test-long``: 100,000).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule

from memshare.core.requests import RequestState
from memshare.engine.scheduler_side import IntegrityError
from memshare.lab.simulate.harness import SchedulerHarness
from memshare.mechanisms.compaction.messages import CompactionCommands
from tests.memshare.engine.test_state_machine import (
    CHECKED,
    Schedule,
    abort,
    assert_clean,
    run_schedules,
    step,
)

pytestmark = [pytest.mark.engine, pytest.mark.timeout(3600)]

COMPACTION = CHECKED | {"policy": {"name": "compaction"}}


def options() -> st.SearchStrategy[dict[str, Any]]:
    return st.builds(
        lambda eager, recent, prompt, budget, thinning, kept, share, least, lookahead: (
            CHECKED
            | {
                "policy": {"name": "compaction", "round_fraction": share, "min_round": least},
                "trigger": {"kind": "eager" if eager else "pressure"},
                "protect": {"recent_tokens": recent, "prompt_tokens": prompt},
                "budget": {
                    "max_dropped_fraction": budget,
                    "max_thinning": thinning,
                    "max_kept_tokens": kept,
                },
                "admission": {"lookahead_tokens": lookahead, "hold_steps": 64},
            }
        ),
        eager=st.booleans(),
        recent=st.sampled_from([0, 32, 128]),
        prompt=st.sampled_from(["all", 0, 32]),  # 0: requests share blocks that may go
        budget=st.sampled_from([0.3, 0.75, 1.0]),
        thinning=st.sampled_from([0.5, 0.8, 1.0]),
        kept=st.sampled_from([None, 160, 256]),
        share=st.sampled_from([0.1, 0.5, 1.0]),
        least=st.sampled_from([1, 2, 4]),
        lookahead=st.sampled_from([0, 64, None]),
    )


class Compactions(Schedule):
    """The same, with the one mechanism."""

    applied: ClassVar[list[int]] = []
    steps: ClassVar[int] = 0

    @initialize(
        options=options(),
        blocks=st.integers(70, 120),
        seed=st.integers(0, 2**32),
        window=st.sampled_from([None, 48, 128]),
    )
    def start(  # type: ignore[override]
        self, options: dict[str, Any], blocks: int, seed: int, window: int | None
    ) -> None:
        super().start(options=options, blocks=blocks, ranks=1, seed=seed, window=window)

    @rule(blocks=st.integers(10, 60), exact=st.booleans())
    def add_long_prompt(self, blocks: int, exact: bool) -> None:
        """One that others are compacted for, or that waits until it is alone."""
        if len(self.rig.scheduler.requests) < 24:
            prompt = [self.random.randrange(250) for _ in range(32 * blocks)]
            extra_args = {"memshare": "off"} if exact else None
            self.rig.add(f"r{self.added}", prompt, 20, extra_args=extra_args)
            self.added += 1
        self.run()


def test_books_survive_anything(folder: Path) -> None:
    run_schedules(Compactions, folder)


def crowded(rig: SchedulerHarness) -> None:
    """Twenty long requests, in a cache for six, checked at every step. Their prompts begin alike,
    and differ in length, so that some fill a block while others are compacted."""
    rng = random.Random(0)
    for i in range(20):
        rig.add(f"p{i}", [*range(64), *(rng.randrange(250) for _ in range(10 + i))], 400)
    for _ in range(300):
        step(rig)


@pytest.fixture
def rig(folder: Path) -> Iterator[SchedulerHarness]:
    """Prompts may go, too, so that requests share blocks that their limits would let go."""
    options = COMPACTION | {"protect": {"prompt_tokens": 0}}
    rig = SchedulerHarness(folder, options, 100, max_num_seqs=16)
    yield rig
    rig.close()


def test_under_pressure_requests_lose_equal_shares_and_end_clean(rig: SchedulerHarness) -> None:
    crowded(rig)
    totals = rig.side.recorder.counters.totals
    assert totals["compactions"] > 10
    assert totals["tokens_dropped"] == 32 * totals["blocks_reclaimed"] > 0
    for state in rig.side.tracker:
        assert len(state.holes) <= rig.side.tracker.shareable(state, state.full)
    assert_clean(rig)


def test_a_preempted_request_is_dense_again(rig: SchedulerHarness) -> None:
    crowded(rig)
    holed = {state.request_id for state in rig.side.tracker if state.holes}
    assert holed
    rig.scheduler.reset_prefix_cache(reset_running_requests=True)
    assert set(ended(rig)) >= holed
    for state in rig.side.tracker:
        assert rig.worker.tables.get(state.request_id, []).count(0) == len(state.holes)
    for _ in range(200):
        step(rig)
    assert_clean(rig)


def ended(rig: SchedulerHarness) -> tuple[str, ...]:
    """What the next step tells the workers to forget."""
    commands = rig.step().kv_connector_metadata.commands.get("compaction")
    return () if commands is None else commands.ended


def test_a_finished_request_is_forgotten_by_the_workers(rig: SchedulerHarness) -> None:
    crowded(rig)
    holed = [state.request_id for state in rig.side.tracker if state.holes]
    abort(rig, holed[:2])
    assert set(ended(rig)) >= set(holed[:2])
    assert ended(rig) == ()


@pytest.mark.parametrize(
    ("sabotage", "symptom"),
    [
        ("no taint", "still publishing"),
        ("packed blocks stay published", "found by its hash"),
        ("shared blocks are packed", "tokens move into a block of"),
        ("a hole is forgotten", "holes"),
        ("a hole is not told", "holes, but told"),
        ("workers are not told", "differs|is not"),
        ("a hole keeps its block", "ref_cnt"),
    ],
)
def test_the_checks_can_fail(
    rig: SchedulerHarness, sabotage: str, symptom: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative controls: each invariant, broken on purpose, is noticed."""
    tables, part = rig.side.tables, rig.side.part
    if sabotage == "no taint":
        tables.stop_publishing = lambda request_id: None
    elif sabotage == "packed blocks stay published":
        tables.make_writable = lambda request_id, indexes: True
    elif sabotage == "shared blocks are packed":
        tables.make_writable = lambda request_id, indexes: True
        monkeypatch.setattr(RequestState, "holds_alone", lambda state, block: True)
    elif sabotage == "a hole is forgotten":
        drop = tables.drop_entries
        tables.drop_entries = lambda name, entries: drop(name, [entries[0] - 1, *entries])
    elif sabotage == "a hole is not told":
        commands = part.commands
        part.commands = lambda: told(commands(), holes={})
    elif sabotage == "workers are not told":
        commands = part.commands
        part.commands = lambda: told(commands(), packings=())
    else:
        tables._pool.free_blocks = lambda blocks: None
    with pytest.raises((IntegrityError, AssertionError), match=symptom):
        crowded(rig)


def prefilled(folder: Path, sabotaged: bool) -> SchedulerHarness:
    """A long prompt that loses tokens while it is computed in chunks, and a second one like it."""
    options = COMPACTION | {
        "protect": {"prompt_tokens": 0, "recent_tokens": 0}, "trigger": {"kind": "eager"},
    }  # fmt: skip
    rig = SchedulerHarness(folder, options, 100, max_num_batched_tokens=128)
    if sabotaged:
        rig.side.tables.unpublish_step = lambda request: True
    prompt = [i % 250 for i in range(1000)]
    for name in ("a", "b"):
        rig.add(name, prompt, 100)
        for _ in range(20):
            step(rig)
    return rig


def test_what_a_step_publishes_before_it_is_computed_is_taken_back(folder: Path) -> None:
    rig = prefilled(folder, sabotaged=False)
    assert rig.side.recorder.counters.totals["compactions"] > 2
    assert_clean(rig)
    rig.close()


def test_were_it_not_taken_back_it_would_be_seen(folder: Path) -> None:
    with pytest.raises(AssertionError, match="found by its hash"):
        prefilled(folder, sabotaged=True)


def told(commands: CompactionCommands | None, **changes: Any) -> CompactionCommands | None:
    return None if commands is None else replace(commands, **changes)
