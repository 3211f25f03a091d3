"""Admission after a preemption or, with compaction, from the first step on; and what it does to a
schedule, together with giving up blocks."""

from __future__ import annotations

import random
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from memshare.lab.simulate.harness import SchedulerHarness
from tools.bench.schedule import (
    COMPACTION,
    DENSE,
    SHARE,
    UNHELD,
    ScheduledRequest,
    ScheduleWorkload,
    of_lengths,
    run,
)

pytestmark = pytest.mark.engine

_, BURST, *_ = of_lengths()  # 24 x 800 tokens; memory for a third of them
HELD = SHARE | {"admission": {"lookahead_tokens": 256, "hold_steps": 50}}


# Blocks are reclaimed only for who needs them: for running requests, or for one that waits.
ON_DEMAND = COMPACTION | {"trigger": {"low_watermark": 0.0, "high_watermark": 0.0}}


def crowd(folder: Path, options: dict[str, Any], requests: int = 20) -> SchedulerHarness:
    rig = SchedulerHarness(folder, options, blocks=100)
    for i in range(requests):
        rig.add(f"r{i}", [i] * 40, 400)
    return rig


def step_until_preempted(rig: SchedulerHarness) -> None:
    for _ in range(400):
        if rig.step().preempted_req_ids:
            return
    pytest.fail("nothing was preempted")


def test_half_the_preemptions_and_a_third_more_tokens_a_step(folder: Path) -> None:
    share = SHARE | {"budget": {"max_shared_fraction": 0.4}}
    dense, ours = run(folder, BURST, DENSE), run(folder, BURST, share)
    assert ours.preemptions <= 0.5 * dense.preemptions
    assert ours.recomputed < dense.recomputed
    assert ours.tokens / ours.steps >= 1.3 * dense.tokens / dense.steps


def test_vllm_admits_as_it_likes_until_it_has_preempted(folder: Path) -> None:
    with closing(crowd(folder, HELD)) as rig:
        manager = rig.scheduler.kv_cache_manager
        rig.step()
        assert len(rig.scheduler.running) == 20
        assert manager.watermark_blocks == rig.side.admission.reserve == 0
        step_until_preempted(rig)
        assert manager.watermark_blocks == rig.side.admission.reserve > 0


def test_admission_is_free_again_after_a_while(folder: Path) -> None:
    with closing(crowd(folder, HELD)) as rig:
        step_until_preempted(rig)
        while rig.scheduler.requests:
            rig.step()
        rig.add("late", [1] * 40, 200)
        for _ in range(60):
            rig.step()
        assert rig.scheduler.kv_cache_manager.watermark_blocks == 0


@pytest.mark.parametrize("policy", [SHARE, COMPACTION], ids=["oldest", "compaction"])
def test_the_reserve_never_starves_a_request(folder: Path, policy: dict[str, Any]) -> None:
    """Even if no admission ever fits the reserve, a request runs as soon as it is alone."""
    options = policy | {"admission": {"lookahead_tokens": 100_000, "hold_steps": 100_000}}
    with closing(crowd(folder, options)) as rig:
        for _ in range(20_000):
            rig.step()
            if not rig.scheduler.requests:
                break
        assert not rig.scheduler.requests


@pytest.mark.parametrize("options", [SHARE | UNHELD, SHARE | {"mode": "observe"}])
def test_nothing_is_held_back_unless_sharing_and_asked(
    folder: Path, options: dict[str, Any]
) -> None:
    with closing(crowd(folder, options)) as rig:
        step_until_preempted(rig)
        assert rig.scheduler.kv_cache_manager.watermark_blocks == 0


def test_the_users_own_watermark_stays_the_least(folder: Path) -> None:
    with closing(crowd(folder, HELD)) as rig:
        rig.side.tables._configured_watermark = 7
        rig.step()
        assert rig.scheduler.kv_cache_manager.watermark_blocks == 7


def test_what_a_text_repeats_is_given_up_and_counts_do_not_depend_on_the_machine(
    folder: Path,
) -> None:
    rng = random.Random(0)
    jobs = []
    for _ in range(8):
        steps = [[rng.randrange(200) for _ in range(30)] for _ in range(10)]
        text = [token for step in steps for token in (*step, *step)]
        jobs.append(
            ScheduledRequest([rng.randrange(200) for _ in range(45)], len(text), forced=text)
        )
    work = ScheduleWorkload("written twice", jobs, 60)
    twins = {"policy": {"name": "twins"}, "steps": {"min_tokens": 4, "max_tokens": 32}}
    first, again = (run(folder, work, twins) for _ in range(2))
    assert first == again
    assert first.remaps > 10
    once = ScheduleWorkload(
        "random", [ScheduledRequest(job.prompt, job.length) for job in jobs], 60
    )
    assert run(folder, once, twins).remaps == 0


def test_compaction_of_a_half_gives_half_as_much_again_and_a_third_of_the_preemptions(
    folder: Path,
) -> None:
    half = COMPACTION | {"budget": {"max_dropped_fraction": 0.5}}
    dense, ours = run(folder, BURST, DENSE), run(folder, BURST, half)
    assert ours.tokens / ours.steps >= 1.45 * dense.tokens / dense.steps
    assert ours.preemptions <= 0.35 * dense.preemptions


def test_with_compaction_no_more_are_admitted_than_can_grow(folder: Path) -> None:
    """The prompts of all twenty would fit, and with `oldest` all are admitted."""
    for options, admitted in ((SHARE, 20), (COMPACTION, 9)):
        with closing(SchedulerHarness(folder, options, blocks=46)) as rig:
            for i in range(20):
                rig.add(f"r{i}", [i] * 40, 400)
            rig.step()
            assert len(rig.scheduler.running) == admitted
            for _ in range(90):
                assert not (rig.step().preempted_req_ids and options is COMPACTION)


def filled(folder: Path, options: dict[str, Any]) -> SchedulerHarness:
    """Three requests that have nearly filled a cache of 99 blocks and may give up many of them."""
    rig = SchedulerHarness(folder, options, blocks=100)
    for i in range(3):
        rig.add(f"r{i}", [i] * 40, 1900)
    while rig.side.tables.free > 4:
        rig.step()
    assert rig.side.recorder.counters.totals["compactions"] == 0
    return rig


@pytest.mark.parametrize("extra_args", [{}, {"memshare": "off"}], ids=["followed", "exact"])
def test_running_requests_are_compacted_for_one_that_waits(
    folder: Path, extra_args: dict[str, Any]
) -> None:
    with closing(filled(folder, ON_DEMAND)) as rig:
        waiting = rig.add("late", [7] * 640, 10, extra_args=extra_args)  # 20 blocks
        for _ in range(4):
            rig.step()
        assert waiting in rig.scheduler.running
        assert len(rig.scheduler.running) == 4
        dropped = sum(rig.side.part.holes.values())
        assert 16 <= dropped <= 24, "what is missing, not what is there"


def test_nobody_is_compacted_for_one_that_would_not_fit_then_either(folder: Path) -> None:
    with closing(filled(folder, ON_DEMAND)) as rig:
        waiting = rig.add("late", [7] * 1920, 10)  # 60 blocks
        for _ in range(4):
            rig.step()
        assert waiting not in rig.scheduler.running
        assert rig.side.part.holes == {}


def test_a_request_that_needs_nearly_all_the_cache_is_not_passed_by_others(folder: Path) -> None:
    with closing(SchedulerHarness(folder, COMPACTION, blocks=62)) as rig:
        for i in range(6):
            rig.add(f"r{i}", [i] * 40, 500)
        for _ in range(50):
            rig.step()
        large = rig.add("large", [9] * 1900, 30)  # 60 of 61 blocks
        for i in range(1200):
            if i % 10 == 0:
                rig.add(f"s{i}", [i % 200] * 40, 300)
            rig.step()
            if large.is_finished():
                break
        assert large.is_finished()


def test_without_pressure_compaction_changes_nothing(folder: Path) -> None:
    rng = random.Random(3)
    jobs = [ScheduledRequest([i] * 60, rng.randrange(20, 200), 3 * i) for i in range(60)]
    chats = ScheduleWorkload("chats", jobs, 600)
    dense, ours = run(folder, chats, DENSE), run(folder, chats, COMPACTION)
    assert ours == dense
    assert ours.given_up == 0


def test_a_step_that_reclaims_for_a_running_request_admits_nobody(folder: Path) -> None:
    with closing(crowd(folder, COMPACTION, requests=1)) as rig:
        rig.step()
        rig.side.admission.close()
        rig.side.waits(rig.add("late", [7] * 40, 10))
        assert rig.scheduler.kv_cache_manager.watermark_blocks == 99
        rig.step()
        assert rig.scheduler.kv_cache_manager.watermark_blocks < 99


def test_nothing_is_held_back_once_reclaiming_has_stopped(folder: Path) -> None:
    with closing(crowd(folder, COMPACTION)) as rig:
        for _ in range(200):
            rig.step()
        assert rig.side.admission.reserve > 0
        rig.side.reclaimer.enabled = False
        rig.step()
        assert rig.scheduler.kv_cache_manager.watermark_blocks == rig.side.admission.reserve == 0


def test_what_a_waiting_request_needs_is_what_it_takes(folder: Path) -> None:
    """What running requests hold of its prompt is not counted, what nobody holds any more is."""
    prompt = [i % 250 for i in range(650)]
    with closing(SchedulerHarness(folder, COMPACTION, blocks=100)) as rig:
        rig.add("first", prompt, 3)
        rig.step()
        for again, expected in (("beside it", 1), ("after it", 21)):
            request = rig.add(again, prompt, 3)
            needed, free = rig.side.tables.blocks_to_admit(request), rig.side.tables.free
            assert needed == expected
            rig.step()
            assert rig.side.tables.free == free - needed
            while rig.scheduler.requests:
                rig.step()
