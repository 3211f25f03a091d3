"""Admission after a preemption, and what sharing and admission do to a schedule together."""

from __future__ import annotations

import random
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from memshare.lab.simulate.harness import SchedulerHarness
from tools.bench.schedule import (
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


def test_the_reserve_never_starves_a_request(folder: Path) -> None:
    """Even if no admission ever fits the reserve, a request runs as soon as it is alone."""
    options = SHARE | {"admission": {"lookahead_tokens": 100_000, "hold_steps": 100_000}}
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
