"""Random schedules against vLLM's real scheduler, block pool and cache manager (design: 1-6).

Only the model is a stand-in (memshare/lab/simulate/harness.py). Every step checks reference counts,
equality of scheduler's and worker's tables, and that no block is overwritten while an entry points
at it.
``SCHEDULER_TEST_STEPS`` sets how many engine steps they make together: 2,000 in ``make test``,
10,000 in ``make test-complete``, 100,000 in ``make test-long``.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)

from memshare.lab.simulate.harness import SchedulerHarness
from memshare.mechanisms.remap.scheduler import RemapPart

pytestmark = [pytest.mark.engine, pytest.mark.timeout(3600)]

STEPS = int(os.environ.get("SCHEDULER_TEST_STEPS", "2000"))
SHARING_RUNS = 5
ACTIONS_A_RUN, STEPS_AN_ACTION = 50, 5
CHECKED = {"integrity": {"check_every": 1, "on_failure": "raise"}}
STAGED = {
    "steps": {"similarity_threshold": 0.0, "min_tokens": 4, "max_tokens": 32, "max_matches": 3},
    "distance": {"similarity_threshold": 0.3, "max_jobs_per_step": 32},
}
POLICIES: list[dict[str, Any]] = [
    {"policy": {"name": "oldest"}},
    {"policy": {"name": "random"}},
    {
        "policy": {"name": "twins"},
        "steps": {"min_tokens": 4, "max_tokens": 32},
        "distance": {"max_jobs_per_step": 2},
    },
    STAGED | {"policy": {"name": "paper"}},
    STAGED | {"policy": {"name": "paper", "survivor": "newest"}, "scope": "tenant"},
]


def memshare_options() -> st.SearchStrategy[dict[str, Any]]:
    return st.builds(
        lambda policy, eager, recent, budget, lookahead: (
            CHECKED
            | policy
            | {
                "trigger": {"kind": "eager" if eager else "pressure"},
                "protect": {"recent_tokens": recent},
                "budget": {"max_shared_fraction": budget},
                "admission": {"lookahead_tokens": lookahead, "hold_steps": 64},
            }
        ),
        policy=st.sampled_from(POLICIES),
        eager=st.booleans(),
        recent=st.sampled_from([0, 32, 128]),
        budget=st.sampled_from([0.3, 0.6, 1.0]),
        lookahead=st.sampled_from([0, 64]),
    )


class Schedule(RuleBasedStateMachine):
    """Anything that may happen between engine steps, in any order."""

    folder: Path
    applied: ClassVar[list[int]] = []  # remaps, or compactions, of each run
    steps: ClassVar[int] = 0  # engine steps of all runs

    @initialize(
        options=memshare_options(),
        blocks=st.integers(70, 120),
        ranks=st.integers(1, 2),
        seed=st.integers(0, 2**32),
        window=st.sampled_from([None, 48, 128]),
    )
    def start(
        self, options: dict[str, Any], blocks: int, ranks: int, seed: int, window: int | None
    ) -> None:
        self.random = random.Random(seed)
        self.rig = SchedulerHarness(
            self.folder, options, blocks, max_num_seqs=16, ranks=ranks, seed=seed, window=window
        )
        self.added = 0
        # So that prefix caching has something to hit.
        self.common = [self.random.randrange(250) for _ in range(64)]
        for _ in range(10):
            self.add_one(shared=64, output=400, salt=None)

    @rule(
        shared=st.integers(0, 64),
        output=st.integers(20, 500),
        salt=st.sampled_from([None, "a", "b"]),
    )
    def add(self, shared: int, output: int, salt: str | None) -> None:
        if len(self.rig.scheduler.requests) < 24:
            self.add_one(shared, output, salt)
        self.run()

    @rule()
    def wait(self) -> None:
        self.run()

    @rule()
    def wait_too(self) -> None:
        """The same: time passes more often than anything else happens."""
        self.run()

    @rule(which=st.integers(0, 63))
    def abort(self, which: int) -> None:
        live = list(self.rig.scheduler.requests)
        if which < len(live):
            abort(self.rig, [live[which]])
        self.run()

    @rule(unlikely=st.integers(0, 15))
    def preempt_all(self, unlikely: int) -> None:
        if unlikely == 15:
            self.rig.scheduler.reset_prefix_cache(reset_running_requests=True)
        self.run()

    def add_one(self, shared: int, output: int, salt: str | None) -> None:
        prompt = self.common[:shared] + [self.random.randrange(250) for _ in range(20)]
        self.rig.add(f"r{self.added}", prompt, output, cache_salt=salt)
        self.added += 1

    def run(self) -> None:
        for _ in range(STEPS_AN_ACTION):
            step(self.rig)
        type(self).steps += STEPS_AN_ACTION

    def teardown(self) -> None:
        if not hasattr(self, "rig"):
            return
        try:
            assert_clean(self.rig)
            totals = self.rig.side.recorder.counters.totals
            self.applied.append(totals["applied"] + totals["compactions"])
        finally:
            self.rig.close()


def test_bookkeeping_survives_anything(folder: Path) -> None:
    run_schedules(Schedule, folder)


def run_schedules(machine: type[Schedule], folder: Path) -> None:
    """Until there were ``STEPS`` steps, and ``SHARING_RUNS`` runs in which blocks were given up.

    Schedules are random, so that how many of them give up blocks is, too: about two of three. A run
    in which none is proves little, and more are made. If one of three did, 100 runs with less than
    5 that do would come once in 10^12 times.
    """
    machine.folder, machine.applied, machine.steps = folder, [], 0

    def sharing() -> int:
        return sum(given_up > 0 for given_up in machine.applied)

    while machine.steps < STEPS or sharing() < SHARING_RUNS:
        assert len(machine.applied) < 100 or sharing() >= SHARING_RUNS, "hardly a run shares"
        run_state_machine_as_test(
            machine,
            # Few runs at a time: later ones of a search repeat earlier ones.
            settings=settings(
                max_examples=10,
                stateful_step_count=ACTIONS_A_RUN,
                deadline=None,
                database=None,
                phases=[Phase.generate],  # one run is long: no shrinking
                suppress_health_check=list(HealthCheck),
            ),
        )


def step(rig: SchedulerHarness) -> None:
    before = published_beside(rig)
    rig.step()
    assert rig.worker.overwritten() == []
    assert rig.worker.faults == []
    pool = rig.scheduler.kv_cache_manager.block_pool
    published = {block.block_id for block in pool.blocks if block.block_hash is not None}
    assert published & rig.worker.approximate == set(), "approximate KV can be found by its hash"
    assert_tenants_are_apart(rig)
    beside = published_beside(rig)
    for key in beside.keys() & before.keys():
        assert beside[key] <= before[key], (
            "approximate KV of layers beside can be found by its hash"
        )
    for state in rig.side.tracker:
        table = rig.side.tables.table(state.request_id)
        for index in state.repointed:
            assert not table[index].is_null


def assert_tenants_are_apart(rig: SchedulerHarness) -> None:
    """No block lies in the tables of two tenants, be it by a remap or by the prefix cache."""
    owners: dict[int, str | None] = {}
    for request in rig.scheduler.requests.values():
        for block in rig.side.tables.table(request.request_id) or ():
            if not block.is_null:
                owner = owners.setdefault(block.block_id, request.cache_salt)
                assert owner == request.cache_salt, "a block crosses tenants"


def published_beside(rig: SchedulerHarness) -> dict[tuple[str, int, int], int]:
    """How many blocks of each request that has lost something can be found by their hash, by group
    of layers beside those with full attention. None is added from then on."""
    managers = rig.scheduler.kv_cache_manager.coordinator.single_type_managers
    return {
        (state.request_id, state.generation, group): sum(
            block.block_hash is not None
            for block in manager.req_to_blocks.get(state.request_id, ())
        )
        for state in rig.side.tracker
        if state.tainted_from is not None
        for group, manager in enumerate(managers)
        if group != rig.worker.group
    }


def abort(rig: SchedulerHarness, request_ids: list[str]) -> None:
    from vllm.v1.request import RequestStatus

    rig.scheduler.finish_requests(request_ids, RequestStatus.FINISHED_ABORTED)


def assert_clean(rig: SchedulerHarness) -> None:
    abort(rig, list(rig.scheduler.requests))
    rig.step()
    pool = rig.scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    assert rig.scheduler.reset_prefix_cache()
    assert len(list(rig.side.tracker)) == 0
    part = rig.side.part
    if isinstance(part, RemapPart):
        assert len(part) == 0
        if (stages := part.stages) is not None:
            rig.step()  # the second rank answers a step later
            assert (len(stages.verifier), stages.verifier.running) == (0, 0)
        assert part.remapper.shared_entries == 0
    else:
        assert part.holes == {}
        assert part.commands() is None
    assert rig.side.admission._growth == {}
    assert rig.side.admission._total == 0
    totals = rig.side.recorder.counters.totals
    assert totals["integrity_checks:failed"] == 0
    assert totals["remap_misses"] == 0


def pressed(rig: SchedulerHarness) -> None:
    """Twenty long requests in a cache for six: pressure from the first hundred steps on."""
    rng = random.Random(0)
    for i in range(20):
        rig.add(f"p{i}", [rng.randrange(250) for _ in range(40)], 400)
    for _ in range(300):
        step(rig)


def test_a_donor_that_goes_takes_its_sharers_along(folder: Path) -> None:
    options = CHECKED | {"policy": {"name": "random", "seed": 1}, "protect": {"recent_tokens": 0}}
    rig = SchedulerHarness(folder, options | {"budget": {"max_shared_fraction": 1.0}}, 100, seed=1)
    points: dict[tuple[str, int, int], int] = {}  # block of each re-pointed entry
    moved = 0
    try:
        for i in range(20):
            rig.add(f"p{i}", [rig.worker._random.randrange(250) for _ in range(40)], 400)
        for _ in range(300):
            step(rig)
            assert rig.side.check_integrity() == []
            for state in rig.side.tracker:
                table = rig.side.tables.table(state.request_id)
                for entry in state.repointed:
                    key = (state.request_id, state.generation, entry)
                    moved += points.get(key, table[entry].block_id) != table[entry].block_id
                    points[key] = table[entry].block_id
        assert moved > 10
        assert_clean(rig)
    finally:
        rig.close()


def between_tenants(rig: SchedulerHarness) -> None:
    """Two tenants with the same prompts, in a cache for six of their twenty requests."""
    for i in range(20):
        rig.add(f"t{i}", [i // 2] * 64, 400, cache_salt="ab"[i % 2])
    for _ in range(300):
        step(rig)


def test_pairs_never_cross_a_tenant(folder: Path) -> None:
    options = CHECKED | STAGED | {"policy": {"name": "paper"}, "scope": "tenant"}
    rig = SchedulerHarness(folder, options, 100, seed=1)
    try:
        between_tenants(rig)
        assert rig.side.recorder.counters.totals["applied"] > 10
    finally:
        rig.close()


@pytest.mark.parametrize("sabotage", ["one history", "one salt"])
def test_a_pair_or_a_cache_hit_that_crosses_would_be_seen(
    folder: Path, sabotage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative controls of the test above and of all random runs."""
    from vllm.v1.core import kv_cache_utils

    options = CHECKED | STAGED | {"policy": {"name": "paper"}, "scope": "tenant"}
    rig = SchedulerHarness(folder, options, 100, seed=1)
    if sabotage == "one history":
        monkeypatch.setattr(rig.side.tracker, "_history_of", lambda request: "everybody's")
    else:
        monkeypatch.setattr(kv_cache_utils, "generate_block_hash_extra_keys", no_extra_keys)
    try:
        with pytest.raises(AssertionError, match="crosses tenants"):
            between_tenants(rig)
    finally:
        rig.close()


def no_extra_keys(request: Any, start: int, end: int, curr_mm: int) -> tuple[None, int]:
    """Block hashes as they would be if vLLM did not know of salts."""
    return None, curr_mm


@pytest.mark.parametrize(
    ("sabotage", "symptom"),
    [
        ("no worker edit", "differs|is not"),
        ("no reference", "ref_cnt"),
        ("no taint", "not tainted|still publishing"),
        ("taint of one group", "layers beside"),
    ],
)
def test_the_checks_can_fail(folder: Path, sabotage: str, symptom: str) -> None:
    """Negative controls: each invariant, broken on purpose, is noticed."""
    from memshare.engine.scheduler_side import IntegrityError

    options, blocks = CHECKED | {"policy": {"name": "oldest"}}, 100
    window = 48 if sabotage == "taint of one group" else None
    rig = SchedulerHarness(folder, options, blocks if window is None else 150, window=window)
    tables, remapper = rig.side.tables, rig.side.part.remapper
    if sabotage == "no worker edit":
        take = remapper.take_remaps
        remapper.take_remaps = lambda: take()[:0]
    elif sabotage == "no reference":
        tables._pool.touch = lambda blocks: None
    elif sabotage == "taint of one group":
        taint = tables._manager.num_cached_block
        tables.stop_publishing = lambda request_id: taint.update({request_id: 1 << 30})
        tables.is_publishing = lambda request_id: False
    else:
        tables.stop_publishing = lambda request_id: None
    try:
        with pytest.raises((IntegrityError, AssertionError), match=symptom):
            pressed(rig)
    finally:
        rig.close()
